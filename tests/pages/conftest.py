"""One browser for all pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import Page, chromium_page


@pytest.fixture(scope="session")
def browser() -> Iterator[Page]:
    with chromium_page() as page:
        yield page
