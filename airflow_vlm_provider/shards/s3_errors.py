"""What S3's errors mean: boto3's exceptions become those of the contract of stores."""

from __future__ import annotations

import contextlib
import errno
import ssl
from collections.abc import Iterator
from typing import Any

from airflow_vlm_provider.shards.stores import ObjectChangedError, StoreError


class BrokenResponseError(ConnectionError):
    """A response began and did not arrive whole.

    boto3 does not ask again then, as it does by itself when a request fails altogether.
    """


@contextlib.contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Raise what the contract of stores says in place of boto3's errors."""
    import urllib3.exceptions
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    try:
        yield
    except boto.ClientError as error:
        raise _contract_error(error.response, uri) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise PermissionError(
            errno.EACCES,
            f"{error}; set the AWS connection's login and password, or give the worker a role",
            uri,
        ) from error
    except (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.IncompleteReadError,
        urllib3.exceptions.HTTPError,
        ssl.SSLError,
        TimeoutError,
    ) as error:
        raise ConnectionError(f"{uri}: the connection to S3 failed: {error}") from error
    except (ResponseParserError, ValueError) as error:
        # A head or a body that was cut off parses as something else: half a date, half an XML document.
        raise BrokenResponseError(f"{uri}: S3's response is not understandable: {error}") from error
    except boto.BotoCoreError as error:
        raise StoreError(f"{uri}: {error}") from error


def _contract_error(response: dict[str, Any], uri: str) -> Exception:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = response.get("Error", {}).get("Code", "")
    said = f"{code}: {response.get('Error', {}).get('Message', '')}"
    if code == "NoSuchBucket":
        return FileNotFoundError(errno.ENOENT, "No such bucket", uri)
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "No such object", uri)
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
        return PermissionError(
            errno.EACCES,
            f"S3 denies access ({said}); give the AWS connection's identity s3:ListBucket on the bucket and "
            "s3:GetObject, s3:PutObject and s3:DeleteObject on its objects, and check that its credentials are valid",
            uri,
        )
    if status == 412:
        return ObjectChangedError(f"{uri} was replaced while it was being read; read it again.")
    if status >= 500 or status == 429:
        return ConnectionError(f"{uri}: S3 could not answer ({said}).")
    return StoreError(f"{uri}: S3 refused the request ({said}).")
