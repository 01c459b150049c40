"""Parts of the pages that are made from the code, and what the site needs beside its pages.

``python -m docs.generate`` writes the parts anew, between their marks; a test finds those that were forgotten.
"""
