"""`iommulab run`: unmodified programs on the model, and what becomes of them when something goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shim.seccomp import Installer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMPILER = next(filter(None, (shutil.which(name) for name in ("gcc", "cc", "clang"))), None)
IOAS_ALLOC = 0x3B81


def supported() -> str | None:
    """Why the host cannot run anything, if so; asked of a child, which keeps the filter."""
    installer = Installer()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(installer.install())
            os.kill(os.getpid(), signal.SIGKILL)  # for exit_group(2) is trapped, and nobody answers
        except OSError as error:
            os._exit(error.errno or 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return os.strerror(status) if status > 0 else None


WHY_NOT = supported()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no seccomp user notification here: {WHY_NOT}")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "iommulab", "run", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, env=environment(), cwd=cwd, check=False
    )


def run_python(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A Python program as the client: unmodified, and it opens hundreds of files that are not the model's."""
    start = "import fcntl, os, struct, sys\nfd = os.open('/dev/iommu', os.O_RDWR)\n"
    return run(*options, "--", sys.executable, "-c", start + program)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C compiler: gcc, cc or clang")
    return tmp_path_factory.mktemp("client")


def build(where: Path, *options: str) -> Path:
    assert COMPILER is not None
    made = where / ("client" + "".join(options))
    done = subprocess.run(
        [COMPILER, "-O1", *options, "-o", str(made), str(HERE / "client.c"), "-pthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and options:
        pytest.skip(f"the compiler does not build with {options}: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("options", [(), ("-static",)], ids=["dynamic", "static"])
def test_a_c_program_prints_what_it_prints_on_linux_7_3_4(binaries: Path, options: tuple[str, ...]) -> None:
    """client.txt is what the same binary printed on the real kernel, in a guest, dynamic and static alike."""
    done = run("--", str(build(binaries, *options)))
    assert done.stderr == ""
    assert done.stdout.splitlines() == (HERE / "client.txt").read_text().splitlines()
    assert done.returncode == 3


def test_a_driver_in_user_space_does_dma_as_on_linux_7_3_4() -> None:
    """vfio_client.txt is what the same program printed on the real kernel, in a guest with `edu` bound to vfio-pci."""
    done = run("--bind", "0000:00:10.0", "--", sys.executable, str(HERE / "vfio_client.py"))
    assert done.stderr == ""
    assert done.stdout.splitlines() == (HERE / "vfio_client.txt").read_text().splitlines()
    assert done.returncode == 0


def test_a_program_that_uses_nothing_of_the_model_runs_as_ever(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text\n")
    done = run("--", "cat", "file", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "text\n", "")


def test_exit_status_and_signals_are_passed_on() -> None:
    assert run("--", "sh", "-c", "exit 42").returncode == 42
    assert run("--", "sh", "-c", "kill -USR1 $$").returncode == 128 + signal.SIGUSR1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--", "no-such-program"], "there is no program 'no-such-program'"),
        (["--", "/etc/passwd"], "there is no program '/etc/passwd'"),
        (["--"], "name a program"),
        ([], "name a program"),
        (["--machine", "nothing", "--", "true"], "nothing"),
        (["--machine", "no-such.toml", "--", "true"], "no-such.toml: cannot be read: no such file or directory"),
        (["--bind", "0000:00:99.0", "--", "true"], "has no PCI function 0000:00:99.0"),
        (["--version", "1.0", "--", "true"], "1.0 is no release that the model knows"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.startswith("iommulab: ")
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_no_program_is_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    done = run("--", str(broken))
    assert done.returncode == 2
    assert re.fullmatch(r"iommulab: .*broken cannot be executed: Exec format error\n", done.stderr)


def test_a_second_supervisor_under_the_first_is_one_sentence() -> None:
    done = run("--", *command("--", "true"))
    assert done.returncode == 2
    assert "there can be one only" in done.stderr


def test_an_ioctl_of_a_newer_release_is_enotty() -> None:
    program = "import errno\ntry:\n  fcntl.ioctl(fd, 0x3b92, bytearray(16))\nexcept OSError as e: print(e.errno)"
    assert run_python(program, "--version", "6.6").stdout == "25\n"
    assert run_python(program).stdout == "22\n"


def test_relative_paths_and_directories_reach_the_model() -> None:
    program = """
os.chdir('/dev'); print(struct.unpack('3I', fcntl.ioctl(os.open('iommu', 2), 0x3b81, struct.pack('3I', 12, 0, 0))))
at = os.open('/dev', os.O_RDONLY)
print(struct.unpack('3I', fcntl.ioctl(os.open('./iommu', 2, dir_fd=at), 0x3b81, struct.pack('3I', 12, 0, 0))))
"""
    assert run_python(program).stdout == "(12, 0, 1)\n" * 2


def test_sysfs_attributes_of_the_model_can_be_read() -> None:
    done = run("--", "cat", "/sys/bus/pci/devices/0000:00:10.0/vendor")
    assert (done.stdout, done.stderr) == ("0x1234\n", "")


def test_pins_show_in_the_status_of_the_process_until_the_last_close() -> None:
    """As on Linux: an IOAS without a domain pins nothing; the fields are there and the host's own."""
    program = "print(*[l.split()[0] for l in open('/proc/self/status') if l[:5] in ('VmPin', 'VmLck')])"
    assert run_python("fcntl.ioctl(fd, 0x3b81, struct.pack('3I', 12, 0, 0))\n" + program).stdout == "VmLck: VmPin:\n"


def test_what_the_supervisor_cannot_do_is_an_errno_and_a_report_and_the_program_goes_on() -> None:
    program = """
import mmap
device = os.open('/dev/vfio/devices/vfio0', os.O_RDWR)
fcntl.ioctl(device, 0x3b76, struct.pack('IIiI', 16, 0, fd, 0))
try: mmap.mmap(device, 4096)
except OSError as error: print(error.errno)
print(struct.unpack('3I', fcntl.ioctl(fd, 0x3b81, struct.pack('3I', 12, 0, 0))))
"""
    done = run_python(program, "--bind", "0000:00:10.0")
    assert done.stdout == "19\n(12, 0, 2)\n"
    assert re.search(r"iommulab run: system call 9\(.*\) of \d+ failed inside:", done.stderr)
    assert "mappings of registers are not served yet" in done.stderr
    assert done.returncode == 0


def test_a_dead_supervisor_leaves_the_program_an_errno_and_no_hang(tmp_path: Path) -> None:
    program = f"""
import os, fcntl, time
fd = os.open('/dev/iommu', os.O_RDWR)
open({str(tmp_path / "started")!r}, 'w').close()
while not os.path.lexists({str(tmp_path / "go")!r}): time.sleep(0.01)
try: fcntl.ioctl(fd, {IOAS_ALLOC}, bytearray(12))
except OSError as error: os.symlink(str(error.errno), {str(tmp_path / "errno")!r})
"""
    supervisor = subprocess.Popen(command("--", sys.executable, "-c", program), env=environment(), cwd=ROOT)
    wait_for(tmp_path / "started")
    supervisor.kill()
    supervisor.wait()
    os.symlink("now", tmp_path / "go")
    wait_for(tmp_path / "errno")
    assert os.readlink(tmp_path / "errno") == "38"  # ENOSYS


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not os.path.lexists(path):
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.01)


def test_a_termination_signal_reaches_the_program(tmp_path: Path) -> None:
    script = f"trap 'exit 5' TERM; : > {tmp_path}/started; while :; do sleep 0.05; done"
    supervisor = subprocess.Popen(command("--", "sh", "-c", script), env=environment(), cwd=ROOT)
    wait_for(tmp_path / "started")
    supervisor.terminate()
    assert supervisor.wait(30) == 5


def test_forty_children_one_after_the_other_have_room() -> None:
    """The model has 15 address spaces; an exited process gives its own back."""
    program = """
for _ in range(40):
    pid = os.fork()
    if not pid:
        fcntl.ioctl(fd, 0x3b81, struct.pack('3I', 12, 0, 0)); os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
print(struct.unpack('3I', fcntl.ioctl(fd, 0x3b81, struct.pack('3I', 12, 0, 0))))
"""
    done = run_python(program)
    assert (done.stdout, done.stderr) == ("(12, 0, 41)\n", "")


def test_a_low_limit_of_descriptors_leaves_the_model_usable() -> None:
    program = 'ulimit -n 64; exec "$0" -c "$1"'
    client = "import fcntl; fd = open('/dev/iommu'); fcntl.ioctl(fd, 0x3b81, bytearray(b'\\x0c' + bytes(11))); print(1)"
    done = run("--", "sh", "-c", program, sys.executable, client)
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_an_ordinary_user_can_run_a_program_on_the_model(binaries: Path) -> None:
    """Without a privilege the filter needs no_new_privs, and the nodes are the supervisor's to give."""
    program = """
import ctypes, os, shutil, sys, tempfile
from iommulab.cli import main, parser
parser()
with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    client = shutil.copy(sys.argv[1], folder)
    pid = os.fork()
    if not pid:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as after an exec
        os._exit(main(["run", "--", client]))
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(build(binaries))],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == (HERE / "client.txt").read_text().splitlines()
    assert done.returncode == 3
