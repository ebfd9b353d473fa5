// What compiled steps need besides Inductor, through the stable C interface of its C++ wrapper: products of small and
// large float32 matrices, a scalar power, and a loop that calls a graph many times.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

// Declared here and not included: torch's headers would take longer to compile than everything else. Weak, so that a
// torch built without them loads this library too, and products() then says no.
namespace at::native::cpublas {  // ATen/native/CPUBlas.h
__attribute__((weak)) void brgemm(int64_t rows, int64_t columns, int64_t depth, int64_t left_stride,
                                  int64_t right_stride, int64_t out_stride, bool add, const float* left,
                                  const float* right, float* out, bool is_vnni);
}
namespace fbgemm {  // fbgemm/Utils.h
template <typename T>
void transpose_simd(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride);
template <>
__attribute__((weak)) void transpose_simd<float>(int64_t, int64_t, const float*, int64_t, float*, int64_t);
}  // namespace fbgemm

namespace {

constexpr int64_t kColumns = 64, kRows = 128;  // of a block, so that it stays in the cache
constexpr int64_t kParallelFrom = 1 << 20;     // multiplications, that make a second thread worth its start

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::exception();
}

// A matrix, or a batch of them, in the memory of a tensor; rows or columns lie one after the other.
struct Matrix {
  float* data;
  int64_t batch, rows, columns, batch_stride, row_stride, column_stride;

  explicit Matrix(AtenTensorHandle tensor) {
    void* pointer;
    int64_t dimensions, *sizes, *strides;
    check(aoti_torch_get_data_ptr(tensor, &pointer));
    check(aoti_torch_get_dim(tensor, &dimensions));
    check(aoti_torch_get_sizes(tensor, &sizes));
    check(aoti_torch_get_strides(tensor, &strides));
    const bool many = dimensions == 3;
    data = static_cast<float*>(pointer);
    batch = many ? sizes[0] : 1, batch_stride = many ? strides[0] : 0;
    rows = sizes[many], columns = sizes[many + 1], row_stride = strides[many], column_stride = strides[many + 1];
    if (columns == 1) column_stride = 1;  // any would do, but these are what the kernels expect
    if (rows == 1 && column_stride == 1) row_stride = columns;
  }
  bool by_rows() const { return column_stride == 1; }
};

float* at_least(std::vector<float>& memory, int64_t size) {
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

// out = left right + bias. Operands by columns are first turned over, block by block. Each block of the result has one
// kernel of oneDNN, whatever the number of threads, so that the numbers do not depend on it.
void multiply(const Matrix& left, const Matrix& right, const float* bias, float* out) {
  const int64_t rows = left.rows, columns = right.columns, depth = left.columns;
  [[maybe_unused]] const bool parallel = left.batch * rows * columns * depth >= kParallelFrom;
  static thread_local std::vector<float> turned_left;
  const float* a = left.data;
  int64_t a_batch = left.batch_stride, a_stride = left.row_stride;
  if (!left.by_rows()) {
    float* copy = at_least(turned_left, left.batch * rows * depth);
    const int64_t blocks = (depth + kColumns - 1) / kColumns;
#pragma omp parallel for collapse(2) schedule(dynamic) if (parallel)
    for (int64_t index = 0; index < left.batch; ++index)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kColumns;
        fbgemm::transpose_simd<float>(std::min(kColumns, depth - first), rows,
                                      left.data + index * left.batch_stride + first * left.column_stride,
                                      left.column_stride, copy + index * rows * depth + first, depth);
      }
    a = copy, a_batch = rows * depth, a_stride = depth;
  }
  const int64_t blocks = (columns + kColumns - 1) / kColumns;
#pragma omp parallel for collapse(2) schedule(dynamic) if (parallel)
  for (int64_t index = 0; index < left.batch; ++index)
    for (int64_t block = 0; block < blocks; ++block) {
      static thread_local std::vector<float> turned_right;
      const int64_t first = block * kColumns, width = std::min(kColumns, columns - first);
      const float* b = right.data + index * right.batch_stride + first * right.column_stride;
      int64_t b_stride = right.row_stride;
      if (!right.by_rows()) {
        float* panel = at_least(turned_right, depth * width);
        fbgemm::transpose_simd<float>(width, depth, b, right.column_stride, panel, width);
        b = panel, b_stride = width;
      }
      for (int64_t row = 0; row < rows; row += kRows) {
        const int64_t height = std::min(kRows, rows - row);
        float* c = out + (index * rows + row) * columns + first;
        if (bias)
          for (int64_t i = 0; i < height; ++i) std::memcpy(c + i * columns, bias + first, width * sizeof(float));
        at::native::cpublas::brgemm(height, width, depth, a_stride, b_stride, columns, bias != nullptr,
                                    a + index * a_batch + row * a_stride, b, c, false);
      }
    }
}

AtenTensorHandle empty(int64_t dimensions, const int64_t* sizes, const int64_t* strides) {
  AtenTensorHandle made;
  check(aoti_torch_empty_strided(dimensions, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(),
                                 0, &made));
  return made;
}

}  // namespace

extern "C" {

// pyrovae::product(Tensor left, Tensor right, Tensor? bias) -> Tensor
AOTITorchError aoti_torch_cpu_product(AtenTensorHandle left, AtenTensorHandle right, AtenTensorHandle* bias,
                                      AtenTensorHandle* given) {
  try {
    const Matrix a(left), b(right);
    int64_t dimensions;
    check(aoti_torch_get_dim(left, &dimensions));
    const int64_t sizes[] = {a.batch, a.rows, b.columns}, strides[] = {a.rows * b.columns, b.columns, 1};
    *given = empty(dimensions, sizes + (3 - dimensions), strides + (3 - dimensions));
    void *out, *added = nullptr;
    check(aoti_torch_get_data_ptr(*given, &out));
    if (bias) check(aoti_torch_get_data_ptr(*bias, &added));
    multiply(a, b, static_cast<float*>(added), static_cast<float*>(out));
    return AOTI_TORCH_SUCCESS;
  } catch (...) {
    return AOTI_TORCH_FAILURE;
  }
}

// pyrovae::powers(float base, Tensor exponents) -> Tensor
AOTITorchError aoti_torch_cpu_powers(double base, AtenTensorHandle exponents, AtenTensorHandle* given) {
  try {
    void *in, *out;
    int64_t count;
    check(aoti_torch_get_numel(exponents, &count));
    const int64_t stride = 1;
    *given = empty(1, &count, &stride);
    check(aoti_torch_get_data_ptr(exponents, &in));
    check(aoti_torch_get_data_ptr(*given, &out));
    const auto* from = static_cast<float*>(in);
    std::transform(from, from + count, static_cast<float*>(out),
                   [base](float exponent) { return static_cast<float>(std::pow(base, double{exponent})); });
    return AOTI_TORCH_SUCCESS;
  } catch (...) {
    return AOTI_TORCH_FAILURE;
  }
}

// Whether this torch and this processor have what multiply() needs.
int products() {
  if (!at::native::cpublas::brgemm || !fbgemm::transpose_simd<float>) return 0;
  try {
    float left = 2, right = 3, out = 0;
    at::native::cpublas::brgemm(1, 1, 1, 1, 1, 1, false, &left, &right, &out, false);
    return out == 6;
  } catch (...) {
    return 0;
  }
}

// A second handle for each tensor, since a graph takes those that it is given.
void keep(AtenTensorHandle* tensors, AtenTensorHandle* kept, int64_t count) {
  for (int64_t i = 0; i < count; ++i) aoti_torch_new_tensor_handle(tensors[i], kept + i);
}

void drop(AtenTensorHandle* tensors, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (tensors[i]) aoti_torch_delete_tensor_object(tensors[i]);
}

// Calls a graph a number of times on the same tensors, which it updates in place; drops what it gives. Returns how many
// calls were made; fewer than were asked for after an error, of which `said` then tells.
int64_t repeat(void (*graph)(AtenTensorHandle*, AtenTensorHandle*), AtenTensorHandle* tensors, int64_t count,
               int64_t results, int64_t times, char* said, int64_t room) {
  std::vector<AtenTensorHandle> inputs(count), outputs(results);
  int64_t made = 0;
  try {
    for (; made < times; ++made) {
      keep(tensors, inputs.data(), count);
      graph(inputs.data(), outputs.data());
      drop(outputs.data(), results);
    }
  } catch (const std::exception& error) {
    std::strncpy(said, error.what(), room - 1);
  } catch (...) {
    std::strncpy(said, "an unknown error", room - 1);
  }
  return made;
}

}  // extern "C"
