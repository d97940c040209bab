"""Signatures of weights and their configuration, by the model-signing package.

Source: https://github.com/sigstore/model-transparency
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, extra
from .checkpoint import CONFIG, WEIGHTS
from .schema import WeightsError

SIGNATURE = "model.sig"
#: Environment variable that says whose signature weights must carry: a public key in PEM, or an identity and
#: its issuer, with a space between them, for Sigstore.
SIGNER = "TIMM_ATTN_SIGNER"
SIGSTORE = "sigstore"


def sign(folder: Path, key: str) -> Path:
    """Sign config.json and model.safetensors of a folder; the signature, ``model.sig`` beside them.

    A signature of these files with the same key file is left as it is: a new one would have other bytes.

    Args:
        folder: With both.
        key: File of a private elliptic-curve key in PEM, which needs no network; or "sigstore", for the
            identity that one logs in with.

    Raises:
        UserError: The key cannot be used, or Sigstore cannot be reached.
        ModuleNotFoundError: The extra ``sign`` is not installed.
    """
    config = _package().signing.Config()
    if key != SIGSTORE and _is_signed(folder, Path(key)):
        return folder / SIGNATURE
    try:
        if key == SIGSTORE:
            config.use_sigstore_signer()
        else:
            config.use_elliptic_key_signer(private_key=Path(key))
        with _signed_files(folder) as copy, tempfile.TemporaryDirectory() as scratch:
            config.sign(copy, Path(scratch) / SIGNATURE)
            shutil.copyfile(Path(scratch) / SIGNATURE, folder / SIGNATURE)
    except Exception as error:  # of cryptography, sigstore and its HTTP library
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot sign {folder} with {key} ({reason}): give the file of a private elliptic-curve key in "
            f"PEM, or {SIGSTORE!r}"
        ) from None
    return folder / SIGNATURE


def _is_signed(folder: Path, key: Path) -> bool:
    """Whether a folder's signature is that of a private key."""
    from cryptography.hazmat.primitives import serialization

    if not (folder / SIGNATURE).is_file():
        return False
    try:
        private: Any = serialization.load_pem_private_key(key.read_bytes(), None)
        public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        with tempfile.TemporaryDirectory() as scratch, _signed_files(folder) as copy:
            (Path(scratch) / "key.pub").write_bytes(public)
            config = _package().verifying.Config()
            config.use_elliptic_key_verifier(public_key=Path(scratch) / "key.pub")
            config.verify(copy, folder / SIGNATURE)
    except Exception:  # another key or other files; what is wrong with the key, signing says
        return False
    return True


def signer_wanted() -> bool:
    """Whether weights must be signed here."""
    return bool(os.environ.get(SIGNER))


def check_signature(folder: Path) -> None:
    """Compare a folder's weights and configuration with its signature, if ``TIMM_ATTN_SIGNER`` is set.

    Raises:
        WeightsError: There is no signature, it is somebody else's, or the files are others than those signed.
        ModuleNotFoundError: The extra ``sign`` is not installed.
    """
    if not signer_wanted():
        return
    signer = os.environ[SIGNER]
    if not (folder / SIGNATURE).is_file():
        raise WeightsError(
            f"{folder} has no {SIGNATURE}, and {SIGNER} asks for one of {signer}: get signed weights, or "
            f"unset {SIGNER}"
        )
    config = _package().verifying.Config()
    identity, _, issuer = signer.rpartition(" ")
    try:
        if Path(signer).is_file() or not identity:
            config.use_elliptic_key_verifier(public_key=Path(signer))
        else:
            config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
        with _signed_files(folder) as copy:
            config.verify(copy, folder / SIGNATURE)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise WeightsError(
            f"{folder} does not carry the signature of {signer} that {SIGNER} asks for ({reason}): do not "
            "use it, or name its signer"
        ) from None


def _package() -> Any:
    with extra("sign"):
        import model_signing
    return model_signing


@contextmanager
def _signed_files(folder: Path) -> Iterator[Path]:
    """A folder with nothing but what is signed, and no links, which the Hub's cache is made of."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in (CONFIG, WEIGHTS):
            source = (folder / name).resolve()
            try:
                os.link(source, Path(scratch) / name)
            except OSError:  # another disk
                shutil.copyfile(source, Path(scratch) / name)
        yield Path(scratch)
