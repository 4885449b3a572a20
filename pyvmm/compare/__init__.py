"""``pyvmm compare``: the same guest and workload on several data paths, what each costs, and which
differences may be noise.
"""
