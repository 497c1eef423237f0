"""Rendered jobs: as in the golden files, valid by JobSet's own schema, free of secrets; bad input is one sentence."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_cases import CASES, GKE, GOLDEN, RECIPE, TPU_VM, render
from paths import TESTS

from ministral_jax.cli import main
from ministral_jax.launching import gke, templates
from ministral_jax.launching.job import TpuSlices

SHELL = [name for name in CASES if not name.endswith(".yaml")]
MANIFESTS = [name for name in CASES if name.endswith(".yaml")]


@pytest.mark.parametrize("name", CASES)
def test_a_job_is_its_golden_file(name):
    assert render(*CASES[name]) == (GOLDEN / name).read_text(encoding="utf-8"), (
        "python tests/launch_cases.py renews them"
    )


def closed(schema):
    """The same schema, refusing fields that it does not name, as a server refuses them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(TESTS.joinpath("jobset_schema.json").read_text(encoding="utf-8"))
    job = schema["properties"]["spec"]["properties"]["replicatedJobs"]["items"]["properties"]["template"]
    pod_metadata = job["properties"]["spec"]["properties"]["template"]["properties"]["metadata"]
    schema["properties"]["metadata"] = pod_metadata  # a CRD leaves its own to the server, and it is the same
    return jsonschema.Draft202012Validator(closed(schema))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid_jobsets(validator, name):
    manifest = yaml.safe_load(render(*CASES[name]))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert [error.message for error in validator.iter_errors(manifest)] == []
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy is accepted with no other
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def rename(node, old, new):
    node[new] = node.pop(old)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m, pod: rename(pod, "nodeSelector", "nodeSelectors"), "'nodeSelectors' was unexpected"),
        (lambda m, pod: m["spec"]["failurePolicy"].update(maxRestarts="3"), "'3' is not of type 'integer'"),
        (lambda m, pod: rename(m["metadata"], "annotations", "annotation"), "'annotation' was unexpected"),
        (lambda m, pod: m["spec"]["failurePolicy"]["rules"][0].update(action="Restart"), "'Restart' is not one of"),
        (lambda m, pod: pod["containers"][0]["resources"].update(limit={}), "'limit' was unexpected"),
    ],
)
def test_the_schema_catches_slips(validator, spoil, message):
    manifest = copy.deepcopy(yaml.safe_load(render(*CASES["gke-tpu.yaml"])))
    spoil(manifest, manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"])
    assert any(message in error.message for error in validator.iter_errors(manifest))


def test_failures_are_told_apart_by_messages_that_kubernetes_writes():
    """The job controller's own words (`pkg/controller/job/pod_failure_policy.go`), against the rules in order."""
    spec = yaml.safe_load(render(*CASES["gke-tpu.yaml"]))["spec"]

    def action(message: str) -> str:
        for rule in spec["failurePolicy"]["rules"]:
            if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
                return rule["action"]
        return "RestartJobSet"

    taken = "Pod lm/tiny-slice-0-0-x has condition DisruptionTarget matching FailJob rule at index 0"
    fault = "Container worker for pod lm/tiny-slice-0-0-x failed with exit code 2 matching FailJob rule at index 1"
    assert action(taken) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(fault) == "FailJobSet"
    assert action("Job has reached the specified backoff limit") == "RestartJobSet"
    codes = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]
    assert (
        codes["operator"] == "NotIn"
        and {75, 137, 143} <= set(codes["values"])
        and not {1, 2, 130} & set(codes["values"])
    )


@pytest.mark.parametrize(
    ("kind", "topology", "count", "chips"),
    [
        ("v5e", "1x1", 1, 1),
        ("v5e", "2x2", 1, 4),
        ("v5e", "2x4", 1, 8),
        ("v5e", "16x16", 64, 4),
        ("v6e", "4x8", 8, 4),
        ("v5p", "2x2x1", 1, 4),
        ("v5p", "2x2x2", 2, 4),
        ("v5p", "4x4x8", 32, 4),
    ],
)
def test_hosts_of_a_slice(kind, topology, count, chips):
    assert gke.hosts(TpuSlices(type=kind, topology=topology)) == count
    text = render("gke", *GKE, f"launch.gke.tpu={{type: {kind}, topology: {topology}}}")
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert job["completions"] == count and container["resources"]["limits"] == {"google.com/tpu": chips}
    assert ("--distributed" in container["command"]) == (count > 1)


def expand(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a container's words: `$(NAME)` where NAME is known, `$$` to `$`."""
    known = lambda match: variables.get(match[1], match[0]) if match[1] else "$"
    return re.sub(r"\$\$|\$\(([^)]*)\)", known, text)


NASTY = (
    "x-note.text=a  'b' \"c\" $(touch pwned) `touch pwned` $HOME $$ $(HOME) %j {{ 7 * 7 }} {% raw %}"
    "\nsecond \\ é 😀 line"
)


def test_words_reach_the_container_verbatim():
    for name in ("gke-tpu.yaml", "gke-gpu.yaml"):
        manifest = yaml.safe_load(render(*CASES[name], NASTY))
        container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
        words = [expand(word, {"HOME": "/root", "JOB_COMPLETION_INDEX": "1"}) for word in container["command"]]
        assert words[:4] == ["ministral-jax", "run", "configs/tiny.yaml", NASTY]
        if name == "gke-gpu.yaml":
            head = "big-run-node-0-0.big-run:8476"
            assert words[4:] == ["--coordinator", head, "--process-count", "2", "--process-index", "1"]
        else:
            assert expand(container["env"][0]["value"], {"Y": "no"}) == "--x=$(Y) --z=$5"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_one_yaml_string(text):
    assert yaml.safe_load(f"a: [{templates.yaml(text)}, 1]") == {"a": [text, 1]}
    assert yaml.safe_load(templates.yaml(text)) == text


@pytest.mark.parametrize("name", SHELL)
def test_scripts_are_clean(tmp_path, name):
    script = GOLDEN / name
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "--shell=bash", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    if name.startswith("tpu-vm"):  # what it sends to the hosts
        worker = re.search(r"^worker=.*?^poll=", script.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        assert worker
        text = subprocess.run(
            ["bash", "-c", worker[0] + '; printf %s "$worker"'], capture_output=True, check=True
        ).stdout
        checked = subprocess.run(["shellcheck", "--shell=bash", "-"], input=text, capture_output=True)
        assert checked.returncode == 0, checked.stdout.decode()


def test_no_secret_of_the_environment_is_in_a_job(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    for arguments in CASES.values():
        text = render(*arguments)
        assert "hf_abcdefghij" not in text and "0123456789abcdef" not in text


def test_settings_of_the_launch_stay_out_of_the_command_and_of_a_stage(tmp_path):
    from ministral_jax.recipe.load import load_recipe, resolve_specs
    from ministral_jax.runs.cascade import identity

    text = render("slurm", "parent", "launch.slurm.nodes=4", "stages.parent.steps=7")
    assert "srun" in text and "launch." not in text and "parent stages.parent.steps=7 --distributed" in text
    plain, other = load_recipe(RECIPE), load_recipe(RECIPE, ["launch.slurm.nodes=4"])
    assert plain != other
    spec = resolve_specs(plain)["parent"]
    assert identity(plain.stages["parent"], spec) == identity(other.stages["parent"], spec)


def test_a_recipe_may_hold_the_block_and_a_template_in_it_stays_text(tmp_path):
    recipe = tmp_path / "mine.yaml"
    text = Path(RECIPE).read_text(encoding="utf-8")
    recipe.write_text(text + "launch: {slurm: {nodes: 3, environment: {A: '{{ job }} {% for x in y %}'}}}\n")
    script = render("slurm", recipe=str(recipe))
    assert "--nodes=3" in script and "export A='{{ job }} {% for x in y %}'" in script
    assert "--nodes=5" in render("slurm", "launch.slurm.nodes=5", recipe=str(recipe))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm", "launch.slurm.nodess=2"], "unknown key launch.slurm.nodess (did you mean nodes?)"),
        (["slurm", "launch.slurrm.nodes=2"], "unknown key launch.slurrm (did you mean slurm?)"),
        (["slurm", "launch.slurm.partition='a b'"], "launch.slurm.partition: string should match pattern"),
        (
            ["slurm", "launch.slurm={gpus_per_node: 8, tasks_per_node: 2}"],
            "tasks_per_node = 2 must equal gpus_per_node = 8",
        ),
        (["slurm", "launch.slurm.time=soon"], "launch.slurm.time: string should match pattern"),
        (["slurm", "parentt"], "no stage 'parentt' in recipe 'tiny' (did you mean parent?)"),
        (["gke"], "has no launch.gke, which launch gke needs"),
        (["gke", "launch.gke.volume.claim=a"], "launch.gke.image is required"),
        (["gke", *GKE], "exactly one of tpu and gpu must be given"),
        (["gke", *GKE, "launch.gke.volume.claim=a"], "exactly one of claim and bucket must be given"),
        (["gke", *GKE, "launch.gke.tpu={type: v7, topology: 4x4}"], "input should be 'v5e', 'v5p' or 'v6e', got 'v7'"),
        (["gke", *GKE, "launch.gke.tpu={type: v5e, topology: 3x3}"], "v5e has no topology '3x3' (accepted: 1x1"),
        (["gke", *GKE, "launch.gke.tpu={type: v5p, topology: 4x4}"], "v5p has no topology '4x4' (accepted: 2x2x1"),
        (
            ["gke", *GKE, "launch.gke.tpu={type: v5e, topology: 4x4, slices: 0}"],
            "launch.gke.tpu.slices: input should be greater",
        ),
        (["gke", *GKE, "launch.gke.tpu={type: v6e, topology: 4x4, hosts: 2}"], "tpu.hosts = 2, but a slice of v6e"),
        (
            ["gke", *GKE, "launch.gke.tpu={type: v6e, topology: 4x4}", "launch.gke.name=8b"],
            "a JobSet cannot be called '8b'",
        ),
        (
            ["tpu-vm", *TPU_VM, "launch.tpu_vm.accelerator_type=h100"],
            "launch.tpu_vm.accelerator_type: string should match",
        ),
        (["slurm", "launch.slurm.environment.HF_TOKEN=hf_x"], "HF_TOKEN looks like a secret"),
        (["local", "--submit"], "launch local runs at once"),
        (["slurm", "--output", "/nowhere/job"], "--output /nowhere/job: No such file or directory"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, message):
    scheduler, *rest = arguments
    assert main(["launch", scheduler, RECIPE, *rest]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("ministral-jax: ") and message in line


@pytest.mark.parametrize(
    ("key", "variable", "how"),
    [
        ("slurm", "WANDB_API_KEY", "launch.slurm.env_file"),
        ("gke", "hf_token", "launch.gke.secrets.NAME={secret: .., key: ..}"),
        ("tpu_vm", "DB_PASSWORD", "launch.tpu_vm.env_file"),
        ("local", "AWS_SECRET", "your shell's environment"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(capsys, key, variable, how):
    """In any scheduler's block, whichever is launched."""
    assert main(["launch", "slurm", RECIPE, f"launch.{key}.environment.{variable}=hush-hush"]) == 2
    error = capsys.readouterr().err
    assert how in error and "hush" not in error


def test_words_that_only_resemble_secrets_pass():
    assert "TOKENIZERS_PARALLELISM=false" in render(
        "slurm", "launch.slurm.environment={TOKENIZERS_PARALLELISM: 'false'}"
    )


def test_output_and_submit(tmp_path, monkeypatch, capfd):
    assert main(["launch", "tpu-vm", RECIPE, *TPU_VM, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "tiny.sh").stat().st_mode & 0o111
    for client in ("sbatch", "kubectl"):
        (tmp_path / client).write_text(f'#!/bin/bash\ncat > {tmp_path}/{client}.stdin; echo "$@"; exit 3\n')
        (tmp_path / client).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    capfd.readouterr()
    assert main(["launch", "slurm", RECIPE, "--submit"]) == 3
    assert (tmp_path / "sbatch.stdin").read_text() == render("slurm").replace("configs/tiny.yaml", RECIPE)
    gpu = [word.replace("Big_Run", "b") for word in CASES["gke-gpu.yaml"][1:]]
    assert main(["launch", "gke", RECIPE, *gpu, "--submit", "--output", str(tmp_path / "job.yaml")]) == 3
    assert capfd.readouterr().out == "\ncreate -f -\n"
    assert (tmp_path / "kubectl.stdin").read_text() == (tmp_path / "job.yaml").read_text()
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "slurm", RECIPE, "--submit"]) == 2
    assert "--submit needs 'sbatch', which is not installed here" in capfd.readouterr().err
