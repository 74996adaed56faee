"""What of a URI may be shown, and which URIs are more than a path."""

from __future__ import annotations

import pytest

from raylit.uri import has_more_than_a_path, redacted


@pytest.mark.parametrize(
    ("uri", "more", "shown"),
    [
        ("/data/runs", False, "/data/runs"),
        ("/data/what?/a:b@c", False, "/data/what?/a:b@c"),
        ("s3://bucket/runs", False, "s3://bucket/runs"),
        ("s3://bucket/a:b@c", False, "s3://bucket/a:b@c"),
        ("abfs://container@account.dfs.core.windows.net/x", False, "abfs://container@account.dfs.core.windows.net/x"),
        ("s3://bucket/runs?region=eu-1", True, "s3://bucket/runs?region=eu-1"),
        ("s3://id:se%2Fcret@bucket/runs", True, "s3://***@bucket/runs"),
        ("s3://id:se/cret@bucket/runs", True, "s3://***@bucket/runs"),
        ("s3://id:secret@bucket/r?region=eu-1", True, "s3://***@bucket/r?region=eu-1"),
        ("x://b/r?account_key=a+b&n=1&sas_token=t", True, "x://b/r?account_key=***&n=1&sas_token=***"),
    ],
)
def test_credentials_are_not_shown(uri: str, more: bool, shown: str) -> None:
    assert has_more_than_a_path(uri) is more
    assert redacted(uri) == shown
    assert redacted(f"cannot read '{uri}': gone") == f"cannot read '{shown}': gone"
