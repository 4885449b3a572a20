"""``pyvmm compare``: runs the same guest and workload on several data paths, counts what each
costs, and says which differences may be noise.
"""
