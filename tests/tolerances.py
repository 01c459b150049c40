"""Every tolerance of the test suite, once. Each comes from a measurement, named beside it; none is ever
loosened.

A value is the largest absolute difference allowed.
"""

#: fp32 kernel against the fp64 reference, reads of O(1) over up to 96 tokens. Measured: 2e-6 (native), 2e-6
#: (torch).
KERNEL_READS = 1e-5
#: fp32 state against the fp64 reference after up to 96 tokens. Measured: 2e-6.
KERNEL_STATE = 1e-5
#: our fp32 reference against the official code's fp32 trace (activations, reads). Measured: 1e-6.
OFFICIAL_TRACE = 1e-5
#: replay of the official trace's logged tokens against the reference's own state: same arithmetic.
EXACT = 0.0
