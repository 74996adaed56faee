"""Several hosts on one machine: each with its own address, file systems, processes and sshd, and one laptop.

A host is a set of Linux namespaces (network, mount, process, name, IPC) around a first process of its own. Its network
card is a cable to a switch, a bridge in a network namespace that nobody else has. To kill the first process is to pull
the host's plug; to take the cable out of the switch is to cut its network. Needs root.

    /home   its own, kept over a reboot           /tmp, /run, /dev/shm   its own, empty after a reboot
    /mnt    its own, with ``/mnt/shared`` in it, the same folder on every host: stands for NFS
    the checkout at its own path, read only, as it was when the lab was made; its environment and the interpreter
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.13"  # nobody outside the switch sees it: the hosts have no way out
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOME, SHARED = "/home/person", "/mnt/shared"
_TOOLS = {
    "ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "rsync": "rsync",
    "ssh": "openssh-client", "ssh-keygen": "openssh-client", "/usr/sbin/sshd": "openssh-server",
}  # fmt: skip
# A host's first process. It reaps what others leave, as any init does.
_BOOT = """
set -e
hostname {name}
mount --make-rprivate /
for kept in {kept}; do mount --rbind "$kept" "$kept"; mount -o remount,bind,ro "$kept"; done
hide() {{  # hide FOLDER HIDDEN-BY: what is kept of it stays
  for kept in {kept}; do
    case "$kept" in "$1"/*) mkdir -p "$2${{kept#"$1"}}"; mount --rbind "$kept" "$2${{kept#"$1"}}" ;; esac
  done
  mount --rbind "$2" "$1"
}}
hide {root} {clone}
mount -o remount,bind,ro {root}
mount -t tmpfs -o mode=1777,size={shm} none /dev/shm
mkdir -p {folder}/mnt/shared
mount --bind {shared} {folder}/mnt/shared
mount -t tmpfs none /run
mkdir -p /run/sshd /run/host
cp -p {folder}/etc/* {folder}/ssh/* /run/host/
for file in passwd shadow hosts hostname resolv.conf; do mount --bind /run/host/$file /etc/$file; done
test ! -e /sys/devices/system/cpu/online || mount --bind /run/host/cpus /sys/devices/system/cpu/online
hide /home {folder}/home
hide /mnt {folder}/mnt
hide /tmp {folder}/tmp
cd /
ip link set lo up
/usr/sbin/sshd -f /run/host/sshd_config -E {home}/sshd.log
touch /run/host/booted
while :; do sleep infinity & wait $!; done
"""
_SSHD = """
HostKey /run/host/host_key
AuthorizedKeysFile /run/host/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
UseDNS no
StrictModes no
PrintMotd no
PrintLastLog no
MaxStartups 100
PidFile /run/sshd.pid
"""


def missing() -> str | None:
    """Why there can be no hosts on this machine, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts of their own need Linux and root"
    lacking = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if lacking:
        return f"hosts of their own need {', '.join(lacking)} (apt-get install)"
    tried = subprocess.run(["unshare", "--mount", "--uts", "--ipc", "--pid", "--net", "--fork", "--mount-proc", "true"],
                           capture_output=True, text=True)  # fmt: skip
    return None if tried.returncode == 0 else f"hosts of their own need namespaces: {tried.stderr.strip()}"


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> Any:
    """Return what ``condition`` gives once it is true."""
    until = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"in vain for {timeout_s:g} s: {what}")
        threading.Event().wait(0.05)
    return found


class Host:
    """One machine. ``number`` is the last part of its address; ``cpus`` are what it says it has."""

    def __init__(self, lab: Lab, name: str, number: int, cpus: int) -> None:
        self.name, self.address, self.cpus = name, f"{NETWORK}.{number}", cpus
        self.folder = lab.folder / name
        self._lab, self._port, self._process = lab, f"port{number}", None
        for part in ("etc", "ssh", "home/person", "mnt", "tmp"):
            (self.folder / part).mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)

    @property
    def home(self) -> Path:
        """Its home folder, as this machine sees it."""
        return self.folder / "home/person"

    @property
    def running(self) -> bool:
        return self._process is not None

    def boot(self) -> None:
        """Switch it on; returns once its sshd listens."""
        shutil.rmtree(self.folder / "tmp")  # nothing is mounted there but for the host itself, which is off
        (self.folder / "tmp").mkdir()
        (self.folder / "tmp").chmod(0o1777)
        kept = " ".join(shlex.quote(str(each)) for each in _kept())
        script = _BOOT.format(name=self.name, kept=kept, root=ROOT, clone=self._lab.clone, shm="3g", home=HOME,
                              folder=self.folder, shared=self._lab.shared)  # fmt: skip
        # Nothing outlives this process, however it ends.
        with open(self.folder / "console", "ab") as console:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--ipc", "--pid", "--net", "--fork",
                 "--kill-child", "--mount-proc", "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, env={"PATH": _PATH},
            )  # fmt: skip
        wait_for(lambda: self._alive() and psutil.Process(self._process.pid).children(), f"{self.name} is on")
        self._first = psutil.Process(self._process.pid).children()[0].pid
        self._lab.plug(self._port, self._first, int(self.address.rsplit(".", 1)[1]))
        inside = ["nsenter", f"--net=/proc/{self._first}/ns/net", "ip"]
        for command in (f"address add {self.address}/24 dev eth0", "link set eth0 up",
                        f"route add default via {NETWORK}.1"):  # Ray asks the way out for its own address
            subprocess.run([*inside, *command.split()], check=True)
        wait_for(lambda: self._alive() and self.run("test -e /run/host/booted", check=False).returncode == 0,
                 f"{self.name} boots")  # fmt: skip

    def _alive(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} did not boot:\n{(self.folder / 'console').read_text()}")
        return True

    def kill(self) -> None:
        """Pull the plug: all that runs there is gone at once, and with it the network card."""
        if self._process is None:
            return
        for pid in [self._first, self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        wait_for(lambda: not psutil.pid_exists(self._first), f"{self.name} is off")
        self._process = None
        self._lab.unplug(self._port)

    def cut(self) -> None:
        """Take its cable out of the switch: nobody is told, packets are lost both ways."""
        self._lab.switch(f"ip link set {self._port} down")

    def heal(self) -> None:
        """Put the cable back."""
        self._lab.switch(f"ip link set {self._port} up")

    def command(self, command: str) -> list[str]:
        """What runs a shell command on the host as a person there would, at a terminal."""
        inside = ["nsenter", "--target", str(self._first), "--mount", "--uts", "--ipc", "--pid", "--net"]
        environment = ["env", "-i", f"HOME={HOME}", "USER=root", "LOGNAME=root", "TERM=dumb", "LANG=C.UTF-8",
                       f"PATH={_PATH}"]  # fmt: skip
        return [*inside, *environment, "bash", "-c", f"cd; . ~/.bashrc; {command}"]

    def run(self, command: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a shell command there; its output, both kinds in one, is in ``stdout``. Raises where it fails."""
        ran = subprocess.run(self.command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout)  # fmt: skip
        if check and ran.returncode != 0:
            raise AssertionError(f"on {self.name}: {command}\nended with {ran.returncode}:\n{ran.stdout}")
        return ran

    def start(self, command: str, **more: Any) -> subprocess.Popen[str]:
        """Start a shell command there, its output to be read from ``stdout``."""
        return subprocess.Popen(self.command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, errors="replace", **more)  # fmt: skip

    def processes(self) -> list[str]:
        """The command lines of all that runs there, but for the host's own: the first process, sshd and its logins."""
        found = []
        space = os.stat(f"/proc/{self._first}/ns/pid").st_ino
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.stat(f"/proc/{process.pid}/ns/pid").st_ino == space and process.pid != self._first:
                    words = process.cmdline()
                    own = words[:2] == ["sleep", "infinity"] or (words and words[0].startswith("sshd"))
                    if words and not own and "/usr/sbin/sshd" not in words[0]:
                        found.append(" ".join(words))
        return found

    def listening(self) -> list[int]:
        """The TCP ports that somebody there listens on, on any of its addresses."""
        found = set()
        for table in ("tcp", "tcp6"):
            for row in Path(f"/proc/{self._first}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state = row.split()[:4]
                if state == "0A":
                    found.add(int(local.rsplit(":", 1)[1], 16))
        return sorted(found)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a file into its home folder."""
        file = self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)


class Lab:
    """Hosts, a laptop that may log in on each of them, and the switch between them. Leave it with ``close``."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="raylit-hosts-"))
        self.shared = self.folder / "shared"
        self.shared.mkdir()
        # A run on the hosts goes on while somebody edits the checkout.
        self.clone = self.folder / "clone"
        shutil.copytree(ROOT, self.clone, symlinks=True, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs"))
        self.hosts: dict[str, Host] = {}
        self._switch = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL
        )
        ours = os.stat("/proc/self/ns/net").st_ino
        wait_for(lambda: os.stat(f"/proc/{self._switch.pid}/ns/net").st_ino != ours, "the switch")
        self.switch("ip link add switch type bridge")
        self.switch("ip link set switch up")

    def switch(self, command: str) -> None:
        """Run a command in the switch's network."""
        subprocess.run(["nsenter", f"--net=/proc/{self._switch.pid}/ns/net", *command.split()], check=True)

    def plug(self, port: str, first: int, number: int) -> None:
        """Lay a cable from a port of the switch to the host of this first process, as its eth0."""
        # A network card has its number for life: with another one after each boot the others would not find the host.
        self.switch(f"ip link add {port} type veth peer name eth0 address 02:00:00:00:00:{number:02x} netns {first}")
        self.switch(f"ip link set {port} master switch up")

    def unplug(self, port: str) -> None:
        """Remove a cable whose host is gone."""
        subprocess.run(["nsenter", f"--net=/proc/{self._switch.pid}/ns/net", "ip", "link", "del", port],
                       capture_output=True)  # fmt: skip - it goes with the host's network, a moment later or now

    def add(self, name: str, cpus: int = 1) -> Host:
        """Make a host; it is off. The first one is the laptop."""
        self.hosts[name] = host = Host(self, name, 10 + len(self.hosts), cpus)
        return host

    def furnish(self) -> None:
        """Give all hosts their names, users and keys. Call it once all are added, before the first is booted."""
        key = self.folder / "key"
        _keygen(key, "laptop")
        for host in self.hosts.values():
            etc, ssh = host.folder / "etc", host.folder / "ssh"
            passwd = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
            # Whoever logs in as root has a home of his own; /root, where this machine keeps things, is not his.
            (etc / "passwd").write_text("\n".join([f"root:x:0:0:root:{HOME}:/bin/bash", *passwd]) + "\n")
            (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
            (etc / "shadow").chmod(0o600)
            # As Debian's installer writes it: to the host itself, its own name stands for an address of loopback.
            names = {"localhost": "127.0.0.1", **{each.name: each.address for each in self.hosts.values()}}
            names[host.name] = "127.0.1.1"
            (etc / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
            (etc / "hostname").write_text(f"{host.name}\n")
            (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            (etc / "cpus").write_text(f"0-{host.cpus - 1}\n" if host.cpus > 1 else "0\n")
            _keygen(ssh / "host_key", host.name)
            shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
            (ssh / "sshd_config").write_text(_SSHD)
            host.write(".bashrc", "")
        laptop = next(iter(self.hosts.values()))
        laptop.write(".ssh/id_ed25519", key.read_text(), 0o600)

    def close(self) -> None:
        """Switch everything off and remove it."""
        for host in self.hosts.values():
            host.kill()
        self._switch.kill()
        self._switch.wait()
        shutil.rmtree(self.folder)


def _keygen(path: Path, comment: str) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)], check=True)


def _kept() -> list[Path]:
    """What of the machine every host needs, also where it lies in a folder that a host has its own of."""
    wanted = {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    return sorted(wanted - {Path("/usr")})  # a folder before what is in it


@contextlib.contextmanager
def lab(hosts: Sequence[tuple[str, int]]) -> Iterator[Lab]:
    """Yield a running lab: ``laptop``, and a host of each name with so many CPUs. All of it is removed afterwards."""
    made = Lab()
    try:
        for name, cpus in [("laptop", 1), *hosts]:
            made.add(name, cpus)
        made.furnish()
        for host in made.hosts.values():
            host.boot()
        yield made
    finally:
        made.close()

