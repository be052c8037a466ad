"""The application over TLS: who trusts the certificate is answered, plain HTTP is not."""

import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from bixse.models.settings import PACKAGED

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_client_with_the_certificate_is_answered_and_no_other(
    tmp_path, run_app, index, corpus, tls_pair
):
    certificate, key = tls_pair
    flags = {"tls-certificate": certificate, "tls-key": key, "topology": "replicate"}
    with run_app(tmp_path / "served", index, corpus, **flags) as served:
        assert "ready at https://" in served.log.read_text()
        reply = served.search(query=corpus[0].text, k=1)
        assert reply.status_code == 200, reply.text
        assert reply.json()["hits"][0]["doc_id"] == corpus[0].doc_id
        assert served.client.get("/readyz").status_code == 200
        assert served.client.get("/nowhere").json()["error"]["type"] == "not_found"
        anyone = httpx.Client(base_url=served.url, verify=served.verify)
        assert anyone.post("/search", json={"query": "x"}).status_code == 401
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"{served.url}/livez", verify=ssl.create_default_context())
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{served.url.replace('https', 'http')}/livez")


def test_a_bad_pair_is_one_sentence_before_anything_starts(tmp_path, index, tls_pair):
    certificate, key = tls_pair
    other = tmp_path / "other.pem"
    other.write_text("no key at all")
    for cert_file, key_file in ((certificate, other), (tmp_path / "none", key), (key, certificate)):
        command = [sys.executable, "-m", "serve.app", "--index", index.url, "--encoder", PACKAGED]
        command += ["--tls-certificate", str(cert_file), "--tls-key", str(key_file)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 2
        (line,) = ran.stderr.splitlines()
        assert line.startswith(f"error: cannot use {cert_file} with {key_file}: ")
