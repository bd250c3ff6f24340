"""What operators and machines may ask a running agent: readiness, metrics, and the control API that the command line reads.

Belongs here: routes, the rows that they answer with, the Unix socket. Does not belong here: where the answers come from; that is an
`AdminView`, which the composition root implements.
"""
