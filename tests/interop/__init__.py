"""Real front-ends against the pump: QEMU guests and DPDK's virtio-user.

``guest`` boots QEMU, ``image`` makes what it boots, ``host`` is the network namespace on the other side of a TAP,
``backend`` starts the pump (or DPDK in its place), ``testpmd`` is DPDK as front-end, ``traffic`` is what the tests
send. Every program dies with the test, and ``process`` keeps what it printed for the report of a failure.
"""
