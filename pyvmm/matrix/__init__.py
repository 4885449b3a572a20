"""``pyvmm matrix``: boots each kernel on each data path, with each number of processors and each
set of features; one boot per combination.
"""
