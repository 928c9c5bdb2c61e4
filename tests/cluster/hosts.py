"""Hosts made of network namespaces on one machine, joined by a switch (a bridge in a namespace of its own).

    host-a eth0 10.77.0.1 --veth-- port-a |        |
                                          | bridge |        each host: its own network, its own name, the same disk
    host-b eth0 10.77.0.2 --veth-- port-b |        |

A user who is not root gets them inside a user namespace. Taking a port down is what a power cut looks like to the other
host: nothing is said any more, not even that a connection is closed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

TOOLS = ("unshare", "nsenter", "ip")


def why_not() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    if absent:
        return f"{', '.join(absent)} not installed (packages util-linux and iproute2)"
    inner = "ip link add sw type bridge && unshare -n -u true"
    done = subprocess.run([*_unshare(), "sh", "-c", inner], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"network namespaces are not allowed here: {done.stderr.strip()}"


def _unshare() -> list[str]:
    return ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-r", "-n"]


class Switch:
    """The namespace that the hosts hang on; `close` takes everything away with it."""

    def __init__(self) -> None:
        self.holder = subprocess.Popen(
            [*_unshare(), "sh", "-c", "ip link add sw type bridge && ip link set sw up && exec sleep 86400"]
        )
        self.hosts: list[Host] = []
        self._until("ip link show sw up | grep -q UP")

    def _until(self, command: str) -> None:
        for _ in range(100):
            if subprocess.run(self.inside("sh", "-c", command), capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise RuntimeError(f"the switch does not come up: {command}")

    def inside(self, *command: str, pid: int | None = None, options: tuple[str, ...] = ("-n",)) -> list[str]:
        """A command line that runs in the switch's namespaces, or in those of another process."""
        user = () if os.geteuid() == 0 else ("-U", "--preserve-credentials")
        return ["nsenter", "-t", str(pid or self.holder.pid), *user, *options, *command]

    def add(self, name: str) -> Host:
        host = Host(self, name, f"10.77.0.{len(self.hosts) + 1}")
        self.hosts.append(host)
        return host

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
            host.holder.kill()
            host.holder.wait()
        self.holder.kill()
        self.holder.wait()


class Host:
    """One namespace of network and name; runs at most one command, its launcher with all that it starts."""

    def __init__(self, switch: Switch, name: str, address: str) -> None:
        self.switch, self.name, self.address, self.port = switch, name, address, f"p-{name}"
        hold = f"hostname {name} && ip link set lo up && exec sleep 86400"
        self.holder = subprocess.Popen(switch.inside("unshare", "-n", "-u", "sh", "-c", hold))
        self.process: subprocess.Popen[bytes] | None = None
        for _ in range(100):
            if self.sh("hostname").strip() == name:
                break
            time.sleep(0.1)
        cable = f"ip link add {self.port} type veth peer name eth0 netns {self.holder.pid}"
        subprocess.run(switch.inside("sh", "-c", f"{cable} && ip link set {self.port} master sw"), check=True)
        self.sh(f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
        self.plug(True)

    def inside(self, *command: str) -> list[str]:
        return self.switch.inside(*command, pid=self.holder.pid, options=("-n", "-u"))

    def sh(self, command: str) -> str:
        done = subprocess.run(self.inside("sh", "-c", command), capture_output=True, text=True, check=False)
        return done.stdout

    def plug(self, on: bool) -> None:
        state = "up" if on else "down"
        subprocess.run(self.switch.inside("ip", "link", "set", self.port, state), check=True)

    def start(self, command: list[str], cwd: Path, environment: dict[str, str], log: Path) -> None:
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                self.inside(*command), cwd=cwd, env={**environment, "GLOO_SOCKET_IFNAME": "eth0"},
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL to all that the host runs (one session, and so one process group)."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def cut_power(self) -> None:
        """The cable first, so that the dying connections cannot say goodbye."""
        self.plug(False)
        self.kill()
