"""Turns what boto3 raises into errors that say in one line what is wrong and what to set."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cmscale.errors import NoSpace, UserError
from cmscale.io.durable import NO_SPACE
from cmscale.io.protocol import ArrivedChanged, Forbidden, StorageAway
from cmscale.io.s3_pace import TooSlow

AWAY = {
    *("InternalError", "ServiceUnavailable", "SlowDown", "SlowDownRead", "SlowDownWrite", "RequestTimeout"),
    *("Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "OperationAborted"),
    *("ConditionalRequestConflict", "XMinioServerNotInitialized"),
}
_REFUSED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "403", "InvalidPayer"}
_UNKNOWN_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidClientTokenId", "InvalidSecurity"}
_EXPIRED = {
    *("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"),
    *("UnrecognizedClientException",),
}
_OTHER_REGION = {
    *("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
    *("InvalidRegion", "301", "307"),
}
_FULL = {"QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull", "507"}
_CHANGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "ContentSHA256Mismatch"}
_UNSUPPORTED = {"NotImplemented", "MethodNotAllowed", "501", "405"}

LONGEST_ERROR_DOCUMENT = 16_384  # bytes
_ERROR_DOCUMENT = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<Error>\s*<Code>([^<]*)</Code>")

SIGN_IN = (
    "renew them (`aws sso login`, or a new AWS_SESSION_TOKEN with its keys), then run the same command again, for a "
    "run with --resume"
)


class Unsupported(UserError):
    """Raised when a store does not carry out a kind of request at all."""


class Expired(UserError):
    """Raised when a server refuses credentials that were good once."""


class ClockSkew(UserError):
    """Raised when a server refuses requests because of this machine's clock."""


class NoSuchUpload(ConnectionError):
    """Raised when an upload in parts has been ended by somebody else."""


@contextmanager
def explained_by_s3(url: str, place: str) -> Iterator[None]:
    """Turns boto3's and botocore's errors into FileNotFoundError, StorageAway, ArrivedChanged or UserError.

    Args:
        url: The storage, for messages.
        place: The object in it.
    """
    from boto3.exceptions import RetriesExceededError
    from botocore import exceptions as boto

    try:
        yield
    except (StorageAway, ArrivedChanged, NoSuchUpload, FileNotFoundError, UserError):
        raise
    except boto.SSLError as error:
        _raise_tls_error(error, url)
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, RetriesExceededError) as error:
        raise StorageAway(f"{url}: the S3 server {_what_it_does(error)}") from error
    except boto.FlexibleChecksumError as error:
        raise ArrivedChanged(f"{place}: arrived with a wrong checksum ({error})") from error
    except boto.ClientError as error:
        _raise_client_error(error, url, place)
    except RecursionError:  # botocore follows redirections to regions without end
        raise UserError(f"{url}: the server redirects to other regions for ever; set AWS_DEFAULT_REGION") from None
    except boto.BotoCoreError as error:
        _raise_of_this_machine(error, url)
    except (ConnectionError, TimeoutError) as error:
        raise StorageAway(f"{url}: the S3 server does not answer ({error})") from error
    except ValueError as error:
        advice = "; check AWS_ENDPOINT_URL" if "endpoint" in str(error).lower() else ""
        raise UserError(f"{url}: {error}{advice}") from None


def _what_it_does(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TooSlow):
        cause = cause.__cause__ or cause.__context__
    return f"answers too slowly ({cause})" if cause else f"does not answer, or not completely ({error})"


def refuse_error_document(body: bytes, place: str) -> None:
    """Raises StorageAway for an object that is S3's description of an error, which some servers send with status 200.

    botocore looks at all answers but those whose body is an object.
    """
    if len(body) <= LONGEST_ERROR_DOCUMENT and (found := _ERROR_DOCUMENT.match(body)):
        raise StorageAway(f"{place}: S3 answered 200 with the error {found[1].decode(errors='replace')}")


def _raise_tls_error(error: Exception, url: str) -> NoReturn:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        why = re.search(r"certificate verify failed: ([^(]*)", text)
        raise UserError(
            f"{url}: the server's certificate is not trusted ({why[1].strip() if why else text}); set "
            "storage.ca_bundle or AWS_CA_BUNDLE to the file of the authority's certificates, and check the host's name "
            "in AWS_ENDPOINT_URL"
        ) from None
    if re.search("WRONG_VERSION_NUMBER|UNKNOWN_PROTOCOL|HTTP_REQUEST|RECORD_LAYER_FAILURE", text):
        raise UserError(f"{url}: the server does not speak TLS; write http:// in AWS_ENDPOINT_URL") from None
    raise StorageAway(f"{url}: the S3 server does not answer, or not completely ({error})") from error


def _raise_of_this_machine(error: Exception, url: str) -> NoReturn:
    """Errors that botocore raises before it asks the storage: credentials, profiles, files of settings."""
    from botocore import exceptions as boto

    match error:
        case boto.NoCredentialsError() | boto.PartialCredentialsError() | boto.NoAuthTokenError():
            what = "no S3 credentials, or half of them; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        case boto.SSOError() | boto.TokenRetrievalError() | boto.LoginError() | boto.UnknownTokenProviderError():
            what = f"the sign-in behind the S3 credentials has expired or is missing ({error}); {SIGN_IN}"
        case boto.CredentialRetrievalError() | boto.RefreshWithMFAUnsupportedError() | boto.MetadataRetrievalError():
            what = (
                f"the S3 credentials can't be fetched ({error}); check credential_process or the role in ~/.aws/config"
            )
        case boto.ProfileNotFound():
            what = f"{error}; set AWS_PROFILE to a profile of ~/.aws/config, or unset it"
        case boto.ConfigNotFound() | boto.ConfigParseError() | boto.InvalidConfigError():
            what = f"{error}; check AWS_CONFIG_FILE and ~/.aws"
        case boto.NoRegionError():
            what = "no region; set AWS_DEFAULT_REGION"
        case _:
            what = str(error)
    raise UserError(f"{url}: {what}") from None


def _raise_client_error(error: Any, url: str, place: str) -> NoReturn:
    code, status = code_of(error), _status_of(error)
    said = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:200]
    if code == "NoSuchBucket":
        bucket = url.removeprefix("s3://").partition("/")[0]
        raise UserError(
            f"{url}: no bucket {bucket!r} there; create it first, or check the URL and AWS_ENDPOINT_URL"
        ) from None
    if code == "NoSuchUpload":
        raise NoSuchUpload(f"{place}: somebody has ended the upload") from error
    if code in ("NoSuchKey", "404", "NotFound"):
        raise FileNotFoundError(errno.ENOENT, "no such object", place) from error
    if code in _FULL:
        raise NoSpace(f"{place}: {NO_SPACE} in the storage ({code}); free some or write elsewhere") from None
    if code in _CHANGED:
        raise ArrivedChanged(f"{place}: arrived changed at the server ({code})") from error
    if code in _UNSUPPORTED or status in (501, 405):
        raise Unsupported(f"{place}: the store does not carry out {error.operation_name} ({code or status})") from None
    if code in AWAY or status == 429 or (status is not None and status >= 500):
        raise StorageAway(f"{place}: S3 answered {code}: {error}") from error
    if code == "RequestTimeTooSkewed":
        raise ClockSkew(
            f"{place}: this machine's clock differs from the server's by too much ({code}); set it (chronyd, ntpd)"
        ) from None
    if code in _REFUSED:
        raise Forbidden(f"{place}: {_why_refused(error, code)}") from None
    if code in _EXPIRED:
        raise Expired(f"{place}: the S3 credentials have expired or are no longer valid ({code}); {SIGN_IN}") from None
    if advice := _advice(error, code):
        raise UserError(f"{place}: {advice}") from None
    raise ConnectionError(f"{place}: S3 answered {code} to {error.operation_name}: {said}") from error


def _why_refused(error: Any, code: str) -> str:
    is_look = error.operation_name in ("GetObject", "HeadObject")
    return (
        f"S3 refuses the credentials ({code} to {error.operation_name}"
        f"{', which without s3:ListBucket is also the answer about what is not there' if is_look else ''}); check "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and the bucket's policy (ops/templates/bucket_policy.json); if "
        "its requester pays, set storage.requester_pays=true"
    )


def _advice(error: Any, code: str) -> str:
    """What is wrong with this user's settings, and what to set; empty if it is not known."""
    if code in _UNKNOWN_KEYS:
        return (
            f"S3 refuses the credentials ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
            "and that they are those of AWS_ENDPOINT_URL"
        )
    if code in _OTHER_REGION:
        region = _region_in(error)
        return f"the bucket is in another region ({code}); set AWS_DEFAULT_REGION{f'={region}' if region else ' to it'}"
    if code == "400" and error.operation_name.startswith("Head"):
        return "S3 answered 400 without a reason; check AWS_DEFAULT_REGION, and that the credentials have not expired"
    return ""


def code_of(error: Any) -> str:
    """The code of a botocore ClientError."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _status_of(error: Any) -> int | None:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _region_in(error: Any) -> str:
    """The bucket's region, as the server's answer names it; empty if it does not."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    named = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    expected = re.search(r"expecting '([a-z0-9-]+)'", str(error))
    return str(named or (expected[1] if expected else ""))
