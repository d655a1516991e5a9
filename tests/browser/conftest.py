"""The fixtures of jupyter_pages, for every test in a browser."""

import pytest

pytest.register_assert_rewrite("jupyter_pages")

from jupyter_pages import browser, jupyter, visit  # noqa: E402, F401
