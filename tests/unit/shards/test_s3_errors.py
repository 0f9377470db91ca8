from __future__ import annotations

import ssl

import pytest
import urllib3.exceptions
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.shards.s3_errors import BrokenResponseError, s3_errors
from airflow_vlm_provider.shards.stores import ObjectChangedError, StoreError

URI = "s3://bucket/a"


def client_error(status: int, code: str, message: str = "as S3 puts it") -> boto.ClientError:
    response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(response, "GetObject")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (client_error(404, "NoSuchKey"), FileNotFoundError, "No such object"),
        (client_error(404, "404", "Not Found"), FileNotFoundError, "No such object"),
        (client_error(404, "NoSuchBucket"), FileNotFoundError, "No such bucket"),
        (client_error(403, "AccessDenied"), PermissionError, "AccessDenied: as S3 puts it.*s3:GetObject"),
        (client_error(403, "403", "Forbidden"), PermissionError, "s3:ListBucket"),
        (client_error(403, "SignatureDoesNotMatch"), PermissionError, "credentials are valid"),
        (client_error(400, "ExpiredToken"), PermissionError, "credentials are valid"),
        (boto.NoCredentialsError(), PermissionError, "login and password"),
        (client_error(412, "PreconditionFailed"), ObjectChangedError, "replaced"),
        (client_error(503, "SlowDown"), ConnectionError, "SlowDown: as S3 puts it"),
        (client_error(500, "InternalError"), ConnectionError, "InternalError"),
        (client_error(429, "TooManyRequests"), ConnectionError, "TooManyRequests"),
        (client_error(301, "PermanentRedirect"), StoreError, "PermanentRedirect"),
        (boto.EndpointConnectionError(endpoint_url="http://x"), ConnectionError, "connection to S3 failed"),
        (boto.ConnectTimeoutError(endpoint_url="http://x"), ConnectionError, "connection to S3 failed"),
        (boto.ReadTimeoutError(endpoint_url="http://x"), ConnectionError, "connection to S3 failed"),
        (boto.ResponseStreamingError(error="x"), ConnectionError, "connection to S3 failed"),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), ConnectionError, "1 read"),
        (urllib3.exceptions.SSLError("x"), ConnectionError, "connection to S3 failed"),
        (ssl.SSLError("x"), ConnectionError, "connection to S3 failed"),
        (TimeoutError("x"), ConnectionError, "connection to S3 failed"),
        (ResponseParserError("x"), BrokenResponseError, "not understandable"),
        (boto.FlexibleChecksumError(error_msg="checksums differ"), StoreError, "checksums differ"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_boto3s_errors_become_the_contracts(error: Exception, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as raised, s3_errors(URI):
        raise error
    assert URI in str(raised.value)
    assert isinstance(raised.value, (VLMError, OSError))
    assert raised.value.__cause__ is error


def test_other_errors_pass() -> None:
    for error in (KeyError("x"), ConnectionResetError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, s3_errors(URI):
            raise error
        assert raised.value is error
