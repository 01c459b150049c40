"""Everything there is to know on one GPU, in one call: ``python -m loadtests.gpu`` (see ``__main__.py``)."""
