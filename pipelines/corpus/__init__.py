"""The demo corpus: real text that the installation itself contains, without a download.

sources.py reads text out of installed packages, recipe.py says which source feeds which file, build.py writes them.
"""
