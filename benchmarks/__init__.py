"""Speed against the machine and against peers, and recipes for published figures. Not installed with the package."""
