"""The host image: a minimal Debian with systemd and sshd, as a fresh server has them, and no more.

Made by mmdebstrap from its own default mirrors. What the machine's own apt needs to reach them (a proxy, an extra
certificate authority) travels into the image; hosts fetch nothing but Debian packages, so nothing else has to.
"""

import contextlib
import hashlib
import os
import shlex
import shutil
import tempfile
from pathlib import Path

from testbed.engine import Engine
from testbed.shell import CommandFailed, provide, run, tar

REPOSITORY = "gpufleet-host"
SUITE = "bookworm"
# python3-apt: Ansible's apt module would install it by itself, but not in check mode. iproute2 and procps are on
# every Debian server; the test suites ask for sockets and processes with them.
PACKAGES = ("systemd-sysv", "openssh-server", "python3", "python3-apt", "ca-certificates", "iproute2", "procps")
# Downloaded into apt's cache and not installed: the roles' own installation then needs no network, and where the
# cache has aged apt fetches what is newer.
LIKELY_PACKAGES = (
    *("nginx", "logrotate", "keepalived", "curl", "supervisor", "nftables", "espeak-ng", "zstd", "git"),
    *("prometheus", "prometheus-node-exporter", "prometheus-nginx-exporter", "prometheus-blackbox-exporter", "mtail"),
)
ENGINE_PACKAGES = ("docker.io", "docker-compose", "iptables")
UNREAD = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*")
# Host keys are made per host; a key baked into an image would be the same on all of them.
CUSTOMIZE = (
    'rm "$1"/etc/ssh/ssh_host_*',
    'chroot "$1" apt-get clean',
    'chroot "$1" apt-get install --yes --quiet=2 --download-only --option=APT::Install-Recommends=true '
    + " ".join(LIKELY_PACKAGES),
)
SSHD_SETTINGS = "HostKey /etc/ssh/ssh_host_ed25519_key\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
AUTHORITIES = Path("/usr/local/share/ca-certificates")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
TMPFS = Path("/dev/shm")
ROOM_FOR_BUILD = 2 << 30


def build(engine: Engine) -> str:
    """Have the host image in the engine and return its name."""
    provide({"mmdebstrap": "mmdebstrap"})
    name = tag()
    if engine.docker("images", "--quiet", name).strip():
        return name
    print(f"building the host image {name}", flush=True)
    # Unpacking some 6,000 small files is the work; in memory it takes two thirds of the time.
    roomy = TMPFS.is_dir() and shutil.disk_usage(TMPFS).free > ROOM_FOR_BUILD
    with tempfile.TemporaryDirectory(prefix="gpufleet-image-", dir=TMPFS if roomy else None) as scratch:
        folder = Path(scratch)
        archive, files = folder / "image.tar", folder / "overlay.tar"
        files.write_bytes(overlay())
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        # Package lists stay for the same reason as the downloaded packages.
        command += ["--skip=cleanup/apt/lists,cleanup/apt/cache", "--dpkgopt=force-unsafe-io"]
        command += [f"--dpkgopt=path-exclude={pattern}" for pattern in UNREAD]
        command += [f"--aptopt={option}" for option in apt_options()]
        # Before the first package: its own downloads may need the authorities; ca-certificates picks them up.
        command += [f"--setup-hook=tar-in {shlex.quote(str(files))} /"]
        command += [f"--customize-hook={hook}" for hook in CUSTOMIZE]
        run("env", f"TMPDIR={scratch}", *command, SUITE, str(archive), seconds=1200)
        engine.docker("import", "--change", 'CMD ["/sbin/init"]', str(archive), name)
    for other in engine.docker("images", "--format", "{{.Repository}}:{{.Tag}}", REPOSITORY).split():
        if not other.startswith(name):
            # Refused, and rightly, while a host of the older recipe exists.
            with contextlib.suppress(CommandFailed):
                engine.docker("rmi", other)
    return name


def with_engine(engine: Engine, name: str) -> str:
    """Have a host image in the engine that has a Docker engine of its own besides, and return its name."""
    install = f"apt-get update && apt-get install --yes --no-install-recommends {' '.join(ENGINE_PACKAGES)}"
    recipe = f"FROM {name}\nRUN {install}\n"
    whole = f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not engine.docker("images", "--quiet", whole).strip():
        print(f"building the host image {whole}", flush=True)
        engine.docker("build", "--tag", whole, "-", send=recipe.encode(), seconds=600)
    return whole


def tag() -> str:
    """Return the image's name: a digest of all that it is made from, so that a changed recipe is another image."""
    recipe = (SUITE, PACKAGES, UNREAD, CUSTOMIZE, apt_options(), overlay())
    return f"{REPOSITORY}:{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"


def apt_options() -> tuple[str, ...]:
    """Return the settings without which apt reaches no mirror from this machine: proxy, clock and retries."""
    wanted = ("Acquire::Check-Date", "Acquire::Check-Valid-Until", "Acquire::Retries")
    kept = ['Acquire::Languages "none"']
    for line in run("apt-config", "dump").splitlines():
        name, _, value = line.rstrip(";").partition(" ")
        if value != '""' and (name in wanted or "::proxy" in name.lower()):
            kept.append(f"{name} {value}")
    return tuple(kept)


def overlay() -> bytes:
    """Return a tar of the files that the image has beside its packages; the same input gives the same bytes."""
    proxies = "".join(f"{name}={os.environ[name]}\n" for name in PROXY_VARIABLES if os.environ.get(name))
    files = {
        "etc/ssh/sshd_config.d/gpufleet.conf": SSHD_SETTINGS.encode(),
        # pam_env gives it to every ssh login.
        "etc/environment": proxies.encode(),
        # Debian's unit wants what no container without privileges has.
        "etc/systemd/system/prometheus.service.d/container.conf": b"[Service]\nPrivateUsers=no\n",
    }
    files |= {str(file.relative_to("/")): file.read_bytes() for file in sorted(AUTHORITIES.glob("**/*.crt"))}
    return tar(files)
