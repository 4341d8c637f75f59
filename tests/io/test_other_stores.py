"""Stores that are not Amazon's, and settings that are wrong: it works, or one line names what to set."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import write_certificates
from fault_proxy import FaultProxy
from outages import pass_time, use_patience

from cmscale.errors import UserError
from cmscale.io import s3_upload
from cmscale.io.probe import probe
from cmscale.io.protocol import StorageAway
from cmscale.io.s3_client import make_client
from cmscale.io.settings import StorageSettings, use_settings
from cmscale.io.storage import open_storage


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def ceph(s3: str, s3_server: str, certificates, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A store over https that takes no checksums behind bodies, with a certificate of a private authority."""
    with FaultProxy(s3_server, certificate=certificates[1], refuses_trailers=True) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def trust(authority: Path) -> None:
    use_settings(StorageSettings(ca_bundle=str(authority)))


def everything_works(url: str, folder: Path) -> None:
    assert [found for found in probe(open_storage(url)) if found.problem] == []
    storage, path = open_storage(url), folder / "large"
    path.write_bytes(b"0123456789" * (2 << 20))
    storage.upload("large", path)
    storage.download("large", folder / "again")
    assert (folder / "again").read_bytes() == path.read_bytes()
    assert [entry.key for entry in storage.list()] == ["large"]


def test_a_store_over_https_that_refuses_trailers_takes_everything(
    s3: str, ceph: FaultProxy, certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 << 20)
    trust(certificates[0])
    everything_works(f"{s3}/x", tmp_path)


def test_boto3_by_itself_does_not_write_there(s3: str, ceph: FaultProxy, certificates) -> None:
    """Otherwise the test above would show nothing."""
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.session.Session().client("s3", verify=str(certificates[0]))
    with pytest.raises(ClientError, match="MissingContentLength"):
        client.put_object(Bucket=s3.removeprefix("s3://"), Key="k", Body=(ceph_body := open(__file__, "rb")))  # noqa: SIM115, PTH123
    ceph_body.close()


def test_a_private_authority_is_named_and_trusted_by_either_setting(
    s3: str, ceph: FaultProxy, certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = pass_time(monkeypatch)
    with pytest.raises(UserError, match=r"certificate is not trusted .*set storage.ca_bundle or AWS_CA_BUNDLE"):
        open_storage(s3).read("x")
    assert clock.waits == []
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates[0]))
    assert open_storage(s3).read_if_present("x") is None
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/file")
    with pytest.raises(UserError, match=r"AWS_CA_BUNDLE: /no/such/file: no such file"):
        open_storage(s3).read("x")
    trust(certificates[0])
    monkeypatch.delenv("AWS_CA_BUNDLE")
    assert open_storage(s3).read_if_present("x") is None


def test_https_where_http_is_spoken_is_named(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pass_time(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.replace("http://", "https://"))
    with pytest.raises((UserError, StorageAway)) as caught:  # as some servers close the connection without a word
        open_storage(s3).read("x")
    if isinstance(caught.value, UserError):
        assert "does not speak TLS; write http:// in AWS_ENDPOINT_URL" in str(caught.value)


# What the server answers -> what the line must name.
ANSWERS = {
    "403 AccessDenied": "storage.requester_pays=true",
    "403 InvalidAccessKeyId": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "403 SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY",
    "400 ExpiredToken": "aws sso login",
    "400 InvalidToken": "AWS_SESSION_TOKEN",
    "301 PermanentRedirect": "AWS_DEFAULT_REGION",
    "400 AuthorizationHeaderMalformed": "AWS_DEFAULT_REGION",
    "404 NoSuchBucket": "AWS_ENDPOINT_URL",
    "507 InsufficientStorage": "no space left",
    "403 QuotaExceeded": "no space left",
}


def test_what_a_user_can_mend_is_one_line_that_names_what_to_set(s3: str, proxy: FaultProxy, monkeypatch) -> None:
    clock = pass_time(monkeypatch)
    storage = open_storage(f"{s3}/x")
    storage.write("a", b"old")
    for answer, named in ANSWERS.items():
        proxy.clear()
        proxy.add(f"answer {answer}")
        for ask in (
            lambda: storage.read("a"),
            lambda: storage.write("b", b"new"),
            lambda: storage.write_if_absent("b", b"new"),
            lambda: list(storage.list()),
        ):
            with pytest.raises(UserError) as caught:
                ask()
            assert named in str(caught.value), answer
            assert str(caught.value).startswith("s3://")
    assert clock.waits == []


def settings_of(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """Credentials come from a file of settings alone."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    (folder / "config").write_text(text)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))


PROFILES = {
    "[default]\ncredential_process = /bin/false\n": "credential_process",
    "[default]\ncredential_process = /no/such/program\n": "credential_process",
    "[default]\nsso_start_url = https://x.example\nsso_region = us-east-1\nsso_account_id = 1\nsso_role_name = r\n": (
        "aws sso login"
    ),
    "[default]\nregion = us-east-1\n": "AWS_ACCESS_KEY_ID",
}


def test_credentials_that_cannot_be_had_are_one_line(s3: str, monkeypatch, tmp_path: Path) -> None:
    for text, named in PROFILES.items():
        settings_of(monkeypatch, tmp_path, text)
        with pytest.raises(UserError, match=named):
            open_storage(s3).read("x")


def test_a_profile_that_does_not_exist_is_named(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings_of(monkeypatch, tmp_path, "[profile other]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_PROFILE", "dead")
    with pytest.raises(UserError, match=r"\(dead\).*set AWS_PROFILE to a profile"):
        open_storage(s3).read("x")


def test_buckets_are_addressed_as_the_profile_says(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example")
    at = {"Bucket": "bucket", "Key": "key"}
    for more, begins in (("", "https://store.example/bucket/key?"), ("virtual", "https://bucket.store.example/key?")):
        (tmp_path / "config").write_text(f"[default]\ns3 =\n  addressing_style = {more}\n" if more else "[default]\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        assert make_client().generate_presigned_url("get_object", Params=at).startswith(begins)


def test_an_endpoint_that_is_no_url_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        open_storage(s3).read("x")


def test_a_requester_who_pays_says_so_in_every_request(s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 << 20)
    use_settings(StorageSettings(requester_pays=True))
    everything_works(f"{s3}/x", tmp_path)
    open_storage(s3).abort_uploads(lambda key: True)
    assert proxy.log
    assert [request for request, _ in proxy.log if not request.endswith(" requester")] == []


CONDITIONAL = "PUT .* if-none-match"


def test_a_store_without_conditional_writes_names_the_setting_that_does_without(s3: str, proxy: FaultProxy) -> None:
    proxy.add("answer 501 NotImplemented", match=CONDITIONAL)
    storage = open_storage(s3)
    with pytest.raises(UserError, match=r"does not carry out PutObject .*set storage.conditional_writes=false"):
        storage.write_if_absent("a", b"one")
    use_settings(StorageSettings(conditional_writes=False))
    assert storage.write_if_absent("a", b"one")
    assert storage.write_if_absent("a", b"one")
    assert not storage.write_if_absent("a", b"two")
    assert storage.read("a") == b"one"
    assert [found for found in probe(storage) if found.problem] == []


def test_a_conflict_with_nothing_there_is_asked_again(s3: str, proxy: FaultProxy, monkeypatch) -> None:
    clock = pass_time(monkeypatch)
    use_patience(30)
    proxy.add("answer 409 ConditionalRequestConflict", match=CONDITIONAL, times=4)
    proxy.add("answer 412 PreconditionFailed", match=CONDITIONAL, times=2)
    assert open_storage(s3).write_if_absent("a", b"one")
    assert len(clock.waits) == 6
    assert open_storage(s3).read("a") == b"one"


def test_a_store_that_lists_no_uploads_is_a_note(s3: str, proxy: FaultProxy, capfd) -> None:
    for answer in ("501 NotImplemented", "403 AccessDenied", "405 MethodNotAllowed"):
        proxy.clear()
        proxy.add(f"answer {answer}", match="GET .*uploads")
        assert open_storage(s3).abort_uploads(lambda key: True) == 0
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"note: unfinished uploads below {s3} can't be ended")
        assert "bucket_lifecycle.json" in line


def test_the_probe_says_what_a_store_can_t_do(s3: str, proxy: FaultProxy) -> None:
    proxy.add("answer 403 AccessDenied", match="DELETE")
    problems = {found.what: found.problem for found in probe(open_storage(s3)) if found.problem}
    assert list(problems) == ["delete"]
    proxy.clear()
    proxy.add("answer 501 NotImplemented", match=CONDITIONAL)
    problems = {found.what: found.problem for found in probe(open_storage(s3)) if found.problem}
    assert list(problems) == ["write conditionally"]
    assert "storage.conditional_writes=false" in problems["write conditionally"]
    proxy.clear()
    proxy.add("answer 403 AccessDenied", match="PUT")
    assert [found.what for found in probe(open_storage(s3))] == ["write"]


def test_a_store_that_overwrites_in_spite_of_the_condition_is_found(s3: str, monkeypatch) -> None:
    storage = open_storage(s3)
    plain = storage.client.put_object
    monkeypatch.setattr(
        storage.client, "put_object", lambda **given: plain(**{k: v for k, v in given.items() if k != "IfNoneMatch"})
    )
    (problem,) = [found.problem for found in probe(storage) if found.problem]
    assert "overwrites what is there" in problem
    assert "storage.conditional_writes=false" in problem


def test_an_upload_that_somebody_ends_begins_anew(s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(b"0123456789" * (2 << 20))
    storage = open_storage(s3)
    rule = proxy.add("answer 404 NoSuchUpload", match="partNumber=3", times=1)
    storage.upload("large", tmp_path / "large")
    assert rule.used == 1
    assert storage.read("large") == (tmp_path / "large").read_bytes()
    proxy.add("reset after", match="POST .*uploadId", times=1)  # it is complete, but nobody was told
    storage.upload("again", tmp_path / "large")
    assert storage.read("again") == (tmp_path / "large").read_bytes()
