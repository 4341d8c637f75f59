"""Makes boto3's client for S3 as this project needs it, on Amazon's servers and on others."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.io.s3_delete import send_md5_with_batches
from cmscale.io.s3_pace import keep_pace
from cmscale.io.settings import storage_settings

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0  # without an answer, per attempt
ATTEMPTS = 3  # of one request, at once; `cmscale.io.patience` waits after that


@lru_cache(maxsize=1)
def _service_models() -> Any:
    """botocore's description of the services: parsed once per process, not once per client."""
    from botocore.loaders import create_loader

    return create_loader()


def make_client() -> Any:
    """A client. boto3 finds credentials, region and endpoint (AWS_ENDPOINT_URL) as it always does.

    boto3 would append a checksum to every body in a form that stores other than Amazon's refuse (MissingContentLength
    on Ceph): it is told not to. Bodies have an MD5 that servers compare, and what matters a SHA-256 of our own.

    Raises:
        UserError: the file of certificates is missing.
    """
    from boto3.session import Session
    from botocore.config import Config as ClientConfig
    from botocore.session import get_session

    # "adaptive" would delay all requests of a client for a minute after a few answers of 503.
    config = ClientConfig(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=32,
    )
    core = get_session()
    core.register_component("data_loader", _service_models())
    _check_credentials(core)
    client = Session(botocore_session=core).client("s3", config=config, verify=_certificates())
    keep_pace(client)
    send_md5_with_batches(client)
    return client


def _check_credentials(session: Any) -> None:
    """Fetches the credentials, so that a program that is missing is not taken for a missing object later."""
    try:
        credentials = session.get_credentials()
        if credentials is not None:
            credentials.get_frozen_credentials()
    except OSError as error:
        raise UserError(
            f"the S3 credentials can't be fetched ({error}); check credential_process of the profile in ~/.aws/config"
        ) from None


def _certificates() -> str | None:
    """The file of certificates to trust besides none other; None for botocore's choice, which AWS_CA_BUNDLE changes."""
    given = storage_settings().ca_bundle
    for name, value in (("storage.ca_bundle", given), ("AWS_CA_BUNDLE", os.environ.get("AWS_CA_BUNDLE"))):
        if value and not Path(value).expanduser().exists():
            raise UserError(f"{name}: {value}: no such file; set it to a file of certificates (PEM)")
    return str(Path(given).expanduser()) if given else None
