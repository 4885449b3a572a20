"""``pyvmm compare``: the same guest and workload on several data paths, what each costs, and what
of it is noise.
"""
