"""Private names of other libraries, one module a library; each use has a test that a new version can break."""
