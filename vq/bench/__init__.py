"""Measuring: back-ends by our own driver, peers side by side, and what of it to set on this machine.

=================  ============================================================================================
`settings`         what can be varied, and how it is written: ``size=64,1518``
`facts`            what belongs to each result: machine, build, date
`distance`         how far apart two processors are, and the tag made of it
`link`             our driver on the socket of any back-end
`target`           which back-end: our own in this process, or somebody's socket
`measure`          one run: packets for a while, each verified
`series`           many runs in alternation, and what is left of them when they are ended early
`summary`          runs to rows: median, spread, the knee
`sleeping`         what it costs that an adaptive back-end sleeps: wake latency, rate under load
`records`          JSON and CSV
`plot`             matplotlib; `plot_terminal`: plotext
`curves`           rows as lines of a plot
`cells`            the vocabulary of the side by side
`testpmd`, `child` DPDK's testpmd, and programs that are measured
`peers`            pairs of runs, DPDK's back-end and ours
`tune`             settings for this machine, against the defaults
=================  ============================================================================================
"""
