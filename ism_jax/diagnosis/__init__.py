"""The five faults of shortcut models, one module each (iSM, arXiv 2510.21250, sec. 3).

Each module has its measures as functions of arrays, a figure, and
`diagnose(subject, ...) -> report.Section`. Functions are called as follows, where x and
noise are [B, H, W, C] and everything else [B] unless stated otherwise:

    velocity(x, t, d, w, label)   mean velocity over a step, as the sampler uses it
    field(x, t, label)            instantaneous velocity without guidance
"""
