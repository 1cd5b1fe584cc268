"""`python -m convnest_kernels doctor`: what is installed, which backend runs what, is it right.

    cli          arguments, exit status, the list of sections
    environment  versions, processor, threads, GPUs, what the extension was built with
    dispatch     per operator and dtype the backend used here, and the reasons against the others
    selfcheck    every backend present against float64
    kernels      with --kernels: the compile report of the Triton kernels
    text         alignment of tables

A section collects a JSON-able value and shows it as lines; another one is an entry in
`cli.SECTIONS`.
"""
