"""Tests and nbval run every notebook at profile ``smoke`` and keep their records out of the build."""

import os
import tempfile

os.environ.setdefault("BOOK_PROFILE", "smoke")
os.environ.setdefault("BOOK_LEDGER", tempfile.mkdtemp(prefix="ledger-"))
