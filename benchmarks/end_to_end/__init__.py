"""What `benchmarks/e2e.py` and `benchmarks/serve.py` are made of: whole models, with and without
fewer visual tokens.

Run from the root of the repository; these modules are no part of the installed package.
"""
