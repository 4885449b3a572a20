# Loaded at the first Tab; the code comes from the pyvmm that is there.
pyvmm completion fish | source
