"""start.sh, restart.sh and clear.sh, run as they are, with stand-ins for docker, nvidia-smi and Python.

Each test works in a copy of the scripts.  Its PATH holds the stand-ins and a few harmless tools, nothing else.  Every
stand-in writes its name and arguments to a log, and fails with status 7 when they, followed by
a semicolon, contain $FAIL.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest

REPOSITORY = Path(__file__).parent.parent
COPIED = ("start.sh", "restart.sh", "clear.sh", "requirements.txt", "requirements-dev.txt", "requirements-runtime.txt")
TOOLS = ("bash", "cat", "cp", "dirname", "env", "grep", "id", "mkdir", "rm", "sed", "sha256sum", "touch")

TOOL = r"""#!/usr/bin/env bash
log() { (IFS=$'\x1f'; printf '%s\n' "$*" >>"$STATE/log"); }
log "${0##*/}" "$@"
if [[ -n ${FAIL-} && "${0##*/} $*;" == *"$FAIL"* ]]; then exit 7; fi
"""
DOCKER = (
    TOOL
    + r"""
case $1 in
    image) if [[ $2 == rm ]]; then rm "$STATE/image"; else [[ -e $STATE/image ]]; fi ;;
    build) echo "a build's output"; touch "$STATE/image" ;;
    info) if [[ -n ${2-} ]]; then echo "[name=seccomp,profile=builtin ${SECURITY-}]"; fi ;;
    run)
        cat
        echo "the command's output"
        if [[ $* == *ninja* ]]; then mkdir -p build/plugins; touch build/plugins/libtrt_graft.so; fi ;;
    ps) cat "$STATE/containers" 2>/dev/null || true ;;
    rm) rm "$STATE/containers" ;;
esac
"""
)
# Asked a question with -c, it answers as a Python of $VERSION; its venv is a folder with more stand-ins.
PYTHON = (
    TOOL
    + r"""
if [[ $1 == -c ]]; then exec @PYTHON@ -c "import sys; sys.version_info = (${VERSION:-3, 11}); $2"; fi
if [[ $1 == --version ]]; then echo "Python ${VERSION/, /.}" && exit; fi
mkdir -p "$4/bin"
for name in python pytest command; do cp "$STATE/tool" "$4/bin/$name"; done
echo "cat; echo \"the command's output\"" >>"$4/bin/command"
"""
)


class Sandbox:
    """A copy of the scripts, and the machine they see."""

    def __init__(self, root: Path) -> None:
        self.home = root / "a folder"
        self.bin = root / "bin"
        self.state = root / "state"
        for folder in (self.home, self.bin, self.state):
            folder.mkdir()
        for name in COPIED:
            shutil.copy(REPOSITORY / name, self.home)
        for name in TOOLS:
            found = shutil.which(name)
            assert found, name
            (self.bin / name).symlink_to(found)
        write_script(self.state / "tool", TOOL)
        self.add("python3", PYTHON.replace("@PYTHON@", f"'{sys.executable}'"))

    def add(self, name: str, script: str = TOOL) -> None:
        (self.bin / name).unlink(missing_ok=True)
        write_script(self.bin / name, script)

    def environment(self, **variables: str) -> Dict[str, str]:
        return {"PATH": str(self.bin), "STATE": str(self.state), **variables}

    def run(self, script: str, *arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.home / script, *arguments],
            env=self.environment(**variables),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    def log(self) -> List[List[str]]:
        """The calls of stand-ins so far, without the questions that change nothing."""
        path = self.state / "log"
        calls = [line.split("\x1f") for line in path.read_text().splitlines()] if path.exists() else []
        return [
            call
            for call in calls
            if call[1:2] not in (["-c"], ["--version"], ["info"], ["-L"]) and call[1:3] != ["image", "inspect"]
        ]

    def commands(self) -> List[List[str]]:
        """What ran inside the environment so far, set-up left out."""
        inside = []
        for call in self.log():
            if call[:2] == ["docker", "run"]:
                inside.append(call[call.index("trt-graft") + 1 :])
            elif call[0] in ("python", "pytest", "command") and call[1:3] != ["-m", "pip"]:
                inside.append(call)
        return [command for command in inside if command[0] not in ("nvidia-smi", "cmake", "ninja")]


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path: Path) -> Sandbox:
    """A machine without Docker and GPU."""
    return Sandbox(tmp_path)


@pytest.fixture
def gpu(tmp_path: Path) -> Sandbox:
    """A machine with both."""
    sandbox = Sandbox(tmp_path)
    sandbox.add("docker", DOCKER)
    sandbox.add("nvidia-smi")
    return sandbox


@pytest.fixture(params=["bare", "gpu"])
def either(request: pytest.FixtureRequest) -> Sandbox:
    return request.getfixturevalue(request.param)


# ---------------------------------------------------------------------------------------------------------------------
# Container
# ---------------------------------------------------------------------------------------------------------------------


def test_container_gets_gpu_folder_user_and_the_command_unchanged(gpu: Sandbox) -> None:
    command = ["command", "two words", 'it\'s "quoted"', "$HOME *", ""]
    result = gpu.run("start.sh", *command)

    assert result.returncode == 0, result.stderr
    assert "container: Docker and a GPU are there" in result.stderr
    *_, run = gpu.log()
    name = run[run.index("--name") + 1]
    assert re.fullmatch(r"trt-graft-\d+", name)
    assert run == [
        *("docker", "run", "--rm", "--init", "--interactive", "--name", name, "--gpus", "all"),
        *("--user", f"{os.getuid()}:{os.getgid()}"),
        *("--env", "HOME=/workspace/trt-graft/build/home", "--env", "USER=trt-graft"),
        *("--env", "CUDA_VISIBLE_DEVICES", "--env", "HF_TOKEN"),
        *("--mount", f"type=bind,source={gpu.home},target=/workspace/trt-graft", "--workdir", "/workspace/trt-graft"),
        *("trt-graft", *command),
    ]
    assert (gpu.home / "build" / "home").is_dir(), "Docker would make it, owned by root"


def test_image_is_built_before_the_command_runs(gpu: Sandbox) -> None:
    gpu.run("start.sh", "command")
    build, check, configure, compile_plugins, run = gpu.log()
    assert build == ["docker", "build", "--tag", "trt-graft", "--build-arg", "TENSORRT_IMAGE", "."]
    assert check[-3:] == ["trt-graft", "nvidia-smi", "-L"]
    configuration = configure[configure.index("trt-graft") + 1 :]
    assert configuration[:6] == ["cmake", "--fresh", "-S", "plugins", "-B", "build/plugins"]
    assert compile_plugins[-3:] == ["ninja", "-C", "build/plugins"]
    assert run[-2:] == ["trt-graft", "command"]
    assert not (gpu.home / ".venv").exists()


def test_rootless_docker_gets_its_root(gpu: Sandbox) -> None:
    """There it is the user."""
    gpu.run("start.sh", "command", SECURITY="name=rootless")
    *_, run = gpu.log()
    assert run[run.index("--user") + 1] == "0:0"


def test_failed_build_stops(gpu: Sandbox) -> None:
    assert gpu.run("start.sh", "command", FAIL="docker build").returncode == 7
    assert gpu.commands() == []


def test_containers_that_do_not_see_the_gpu(gpu: Sandbox) -> None:
    result = gpu.run("start.sh", "command", FAIL="trt-graft nvidia-smi")
    assert result.returncode == 2
    assert "nvidia-container-toolkit" in result.stderr.splitlines()[-1]
    assert gpu.commands() == []


def test_plugins_that_do_not_compile(gpu: Sandbox) -> None:
    result = gpu.run("start.sh", "command", FAIL="trt-graft ninja")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "trt-graft: the plugins do not compile: see above"
    assert gpu.run("restart.sh", "command").returncode == 2, "engines would do without plugins, and hardly say so"
    assert gpu.commands() == []


def test_terminal_is_passed_on(gpu: Sandbox) -> None:
    leader, follower = pty.openpty()
    os.write(leader, b"\x04")  # the end of what is typed
    try:
        subprocess.run(
            [gpu.home / "start.sh", "shell"],
            env=gpu.environment(),
            stdin=follower,
            stdout=follower,
            stderr=subprocess.PIPE,
            timeout=20,
            check=True,
        )
    finally:
        os.close(leader)
        os.close(follower)
    *_, run = gpu.log()
    assert "--tty" in run
    assert run[-1] == "bash"


def test_restart_does_not_build(gpu: Sandbox) -> None:
    gpu.run("start.sh", "command")
    before = len(gpu.log())
    assert gpu.run("restart.sh", "command", "two words").returncode == 0
    assert [call[1] for call in gpu.log()[before:]] == ["run"]
    assert gpu.commands()[-1] == ["command", "two words"]


# ---------------------------------------------------------------------------------------------------------------------
# .venv
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "fail", "reason"),
    [
        ("bare", "", "Docker is not installed"),
        ("gpu", "docker info", "Docker does not answer"),
        ("gpu", "nvidia-smi -L", "no NVIDIA GPU is visible"),
    ],
)
def test_venv_and_why(machine: str, fail: str, reason: str, request: pytest.FixtureRequest) -> None:
    sandbox: Sandbox = request.getfixturevalue(machine)
    result = sandbox.run("start.sh", "command", "two words", FAIL=fail)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0].startswith(f"trt-graft: running in .venv: {reason}")
    assert sandbox.commands() == [["command", "two words"]]
    assert not any(call[0] == "docker" for call in sandbox.log())


@pytest.mark.parametrize("wsl", [True, False])
def test_hint_on_wsl(gpu: Sandbox, wsl: bool) -> None:
    gpu.add("grep", f"#!/usr/bin/env bash\n[[ $* == *microsoft*/proc/version ]] && {str(wsl).lower()}\n")
    result = gpu.run("start.sh", "command", FAIL="nvidia-smi -L")
    assert ("WSL2" in result.stderr) == wsl
    assert result.returncode == 0


def test_venv_is_made_once(bare: Sandbox) -> None:
    for _ in range(2):
        assert bare.run("start.sh", "command").returncode == 0
    assert bare.run("restart.sh", "command").returncode == 0
    assert bare.log() == [
        ["python3", "-m", "venv", "--clear", ".venv"],
        [
            *("python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"),
            *("-r", "requirements.txt", "-r", "requirements-dev.txt"),
        ],
        *3 * [["command"]],
    ]


@pytest.mark.parametrize("broken", ["-m venv", "pip install"])
def test_half_finished_set_up_is_done_again(bare: Sandbox, broken: str) -> None:
    assert bare.run("start.sh", "command", FAIL=broken).returncode == 7
    assert bare.commands() == []
    assert bare.run("restart.sh", "command").returncode == 2
    assert bare.run("start.sh", "command").returncode == 0
    assert sum(call[1:3] == ["-m", "venv"] for call in bare.log()) == 2
    assert bare.commands() == [["command"]]


def test_new_requirements_need_a_new_venv(bare: Sandbox) -> None:
    bare.run("start.sh", "command")
    with (bare.home / "requirements-dev.txt").open("a") as file:
        file.write("another==1\n")
    assert bare.run("restart.sh", "command").returncode == 2
    bare.run("start.sh", "command")
    assert sum(call[1:3] == ["-m", "venv"] for call in bare.log()) == 2


def test_copied_folder_needs_a_new_venv(bare: Sandbox) -> None:
    bare.run("start.sh", "command")
    copy = bare.home.with_name("copy")
    shutil.copytree(bare.home, copy)
    bare.home = copy
    assert bare.run("restart.sh", "command").returncode == 2


def test_venv_whose_python_is_gone_is_made_again(bare: Sandbox) -> None:
    bare.run("start.sh", "command")
    (bare.home / ".venv" / "bin" / "python").unlink()
    assert bare.run("start.sh", "command").returncode == 0
    assert sum(call[1:3] == ["-m", "venv"] for call in bare.log()) == 2


def test_python_too_old(bare: Sandbox) -> None:
    result = bare.run("start.sh", "command", VERSION="3, 10")
    assert result.returncode == 2
    assert "Python 3.11 to 3.14 is needed; found Python 3.10" in result.stderr.splitlines()[-1]
    assert bare.log() == []


def test_another_python_when_the_first_is_too_old(bare: Sandbox) -> None:
    shutil.copy(bare.bin / "python3", bare.bin / "python3.12")
    bare.add("python3", "#!/usr/bin/env bash\nexit 1\n")
    assert bare.run("start.sh", "command").returncode == 0
    assert bare.log()[0][:3] == ["python3.12", "-m", "venv"]


def test_python_without_venv(bare: Sandbox) -> None:
    result = bare.run("start.sh", "command", FAIL="ensurepip")
    assert result.returncode == 2
    assert "python3 cannot make virtual environments" in result.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


def test_restart_without_set_up(either: Sandbox) -> None:
    result = either.run("restart.sh", "command")
    assert result.returncode == 2
    assert re.fullmatch(r"trt-graft: .*run \./start\.sh first\n", result.stderr)
    assert either.log() == []


def test_standard_input_and_output_are_the_commands_alone(either: Sandbox) -> None:
    result = either.run("start.sh", "command", stdin="the command's input\n")
    assert result.stdout == "the command's input\nthe command's output\n"


@pytest.mark.parametrize("script", ["start.sh", "restart.sh"])
def test_status_is_the_commands(either: Sandbox, script: str) -> None:
    either.run("start.sh", "command")
    assert either.run(script, "command", "broken", FAIL="broken").returncode == 7


@pytest.mark.parametrize("script", ["start.sh", "restart.sh"])
def test_test_runs_pytest(either: Sandbox, script: str) -> None:
    either.run("start.sh", "command")
    assert either.run(script, "test", "-k", "one or two").returncode == 0
    assert either.commands()[-1] == ["pytest", "-k", "one or two"]


def demo_commands() -> List[List[str]]:
    lines = []
    for model, output in (("restormer", "restored"), ("trocr", "lines.jsonl")):
        samples = f"build/{model}/samples"
        lines += [
            f"python export_onnx.py {model}",
            f"python surgeon.py {model} --precision fp32",
            f"python surgeon.py {model} --precision fp16",
            f"python build_engine.py {model} --precision fp32",
            f"python build_engine.py {model} --precision fp16",
            f"python compare.py {model} --write-samples {samples}",
            f"python infer_trt.py {model} {samples} -o build/{model}/{output}",
            f"python compare.py {model}",
        ]
    return [line.split() for line in lines]


@pytest.mark.parametrize("script", ["start.sh", "restart.sh"])
def test_demo_runs_every_step_in_order_and_ends_with_the_summaries(either: Sandbox, script: str) -> None:
    either.run("start.sh", "command")
    for model in ("restormer", "trocr"):
        (either.home / "build" / model).mkdir(parents=True)
        (either.home / "build" / model / "report.md").write_text(f"# {model}\nall bars met\n\n## Details\n\nlong\n")
    result = either.run(script)
    assert result.returncode == 0, result.stderr
    assert either.commands()[1:] == demo_commands()
    ends = [f"# {model}\nall bars met\n\nFull report: build/{model}/report.md\n" for model in ("restormer", "trocr")]
    assert result.stdout.endswith("\n".join(ends))
    assert "long" not in result.stdout


@pytest.mark.parametrize("step", range(16))
def test_demo_stops_at_the_step_that_fails(gpu: Sandbox, step: int) -> None:
    commands = demo_commands()
    assert gpu.run("start.sh", FAIL=" ".join(commands[step]) + ";").returncode == 7
    assert gpu.commands() == commands[: step + 1]


def test_demo_stops_in_venv_too(bare: Sandbox) -> None:
    assert bare.run("start.sh", FAIL="compare.py restormer;").returncode == 7
    assert bare.commands() == demo_commands()[:8]


@pytest.mark.parametrize("script", ["start.sh", "restart.sh", "clear.sh"])
def test_help_does_nothing_else(either: Sandbox, script: str) -> None:
    result = either.run(script, "--help")
    assert result.returncode == 0
    assert ("./clear.sh" if script == "clear.sh" else "./start.sh COMMAND") in result.stdout
    assert either.log() == []
    assert not (either.home / ".venv").exists()


def test_unknown_option(either: Sandbox) -> None:
    result = either.run("start.sh", "--fast")
    assert result.returncode == 2
    assert result.stderr == "trt-graft: unknown option --fast: see ./start.sh --help\n"
    assert either.log() == []


# ---------------------------------------------------------------------------------------------------------------------
# clear.sh
# ---------------------------------------------------------------------------------------------------------------------


def test_clear_removes_all_and_may_be_repeated(gpu: Sandbox) -> None:
    gpu.run("start.sh", "command")
    gpu.run("start.sh", "command", FAIL="nvidia-smi -L")  # .venv as well
    (gpu.state / "containers").write_text("c0ffee\n")
    kept = gpu.home / "photo.png"
    kept.touch()
    before = len(gpu.log())

    result = gpu.run("clear.sh")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        *("removed container c0ffee", "removed image trt-graft", "removed .venv", "removed build")
    ]
    assert gpu.log()[before:] == [
        ["docker", "ps", "--all", "--quiet", "--filter", "name=^trt-graft-"],
        ["docker", "rm", "--force", "c0ffee"],
        ["docker", "image", "rm", "trt-graft"],
    ]
    assert sorted(path.name for path in gpu.home.iterdir()) == sorted([*COPIED, kept.name])

    again = gpu.run("clear.sh")
    assert (again.returncode, again.stdout) == (0, "nothing to remove\n")


def test_clear_without_docker(bare: Sandbox) -> None:
    bare.run("start.sh", "command")
    assert bare.run("clear.sh").stdout == "removed .venv\n"


def test_clear_says_that_docker_does_not_answer(gpu: Sandbox) -> None:
    assert "stay" in gpu.run("clear.sh", FAIL="docker info").stdout


# ---------------------------------------------------------------------------------------------------------------------
# The files around
# ---------------------------------------------------------------------------------------------------------------------


def test_requirements_are_pinned() -> None:
    for path in REPOSITORY.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert not line or line.startswith("#") or re.fullmatch(r"[\w-]+==[\w.]+", line), f"{path.name}: {line}"


def test_image_leaves_tensorrt_rtx_out() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    pattern = re.search(r"sed -i '/(\^.*?)/d'", dockerfile)
    assert pattern
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if re.match(pattern[1], line)] == [line for line in lines if "rtx==" in line]
