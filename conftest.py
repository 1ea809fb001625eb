"""Tests and nbval run every notebook at profile ``smoke``, keep their records out of the build, and use one thread.

Small matrix products on a busy machine spend their time waiting for threads, so one thread is faster and steadier.
"""

import os
import tempfile

os.environ.setdefault("BOOK_PROFILE", "smoke")
os.environ.setdefault("BOOK_LEDGER", tempfile.mkdtemp(prefix="ledger-"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
