"""The files of `cluster/` are what Ray, KubeRay and our own command line take.

KubeRay ships no schema with Ray: its fields are listed below, from the API reference of KubeRay 1.7
(docs/reference/api.md in ray-project/kuberay), of which only those that stood in 1.5.1 are used.
"""

import re
import shlex
import tomllib

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.cli import submit
from ray.scripts import scripts
from ray.serve.schema import ServeDeploySchema

from jobs.command import parse
from serve.settings import ServeArgs

LAUNCHER = ("aws", "gcp")
KUBERAY = {"rayjob": "rayClusterSpec", "rayservice": "rayClusterConfig"}
FILES = ("aws.yaml", "gcp.yaml", "rayjob.yaml", "rayservice.yaml", "networkpolicy.yaml")
COMMENTED = (*FILES, "Dockerfile", "README.md")

FIELDS = {
    "RayJob": {
        *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy"),
        *("entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId"),
        *("managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes"),
        *("submissionMode", "submitterConfig", "submitterPodTemplate", "suspend"),
        *("ttlSecondsAfterFinished",),
    },
    "RayService": {
        *("excludeHeadPodFromServeSvc", "rayClusterConfig", "rayClusterDeletionDelaySeconds"),
        *("serveConfigV2", "serveService", "upgradeStrategy"),
    },
    "cluster": {
        *(
            "authOptions",
            "autoscalerOptions",
            "enableInTreeAutoscaling",
            "gcsFaultToleranceOptions",
        ),
        *("headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend"),
        *("workerGroupSpecs",),
    },
    "head": {
        *("enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType"),
        *("template",),
    },
    "group": {
        *("groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts"),
        *("rayStartParams", "replicas", "resources", "scaleStrategy", "suspend", "template"),
    },
    "autoscaler": {
        *("env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources"),
        *("securityContext", "upscalingMode", "version", "volumeMounts"),
    },
}


@pytest.fixture
def read(root):
    """The YAML of a file of `cluster/`."""

    def reader(name):
        return yaml.safe_load((root / "cluster" / name).read_text())

    return reader


def arguments(command, words):
    """What Ray's own command line makes of these words; raises when it knows one of them not."""
    return command.make_context(command.name, list(words)).params


def commands(text):
    """Every command line in fenced blocks or in comments, as words, continued lines joined."""
    joined = re.sub(r"\\\n[#\s]*", "", text)
    lines = [re.sub(r"^#\s{3,}", "", line) for line in joined.splitlines()]
    starts = ("ray ", "RAY_AUTH_MODE=token ", "export ", "kubectl ", "docker ", "python ")
    pieces = (piece for line in lines if line.startswith(starts) for piece in line.split(" && "))
    return [shlex.split(piece) for piece in pieces]


@pytest.mark.parametrize("place", LAUNCHER)
def test_ray_up_files_pass_rays_own_validation(read, place):
    config = prepare_config(read(f"{place}.yaml"))
    validate_config(config)
    assert config["available_node_types"]["cpu"]["min_workers"] == 0
    assert config["available_node_types"]["gpu"]["min_workers"] == 0


def test_rays_validation_is_one_that_refuses(read):
    config = prepare_config(read("aws.yaml"))
    config["available_node_types"]["gpu"]["spot"] = True
    with pytest.raises(Exception, match="spot"):
        validate_config(config)


@pytest.mark.parametrize("place", LAUNCHER)
def test_ray_up_starts_an_idle_head_on_loopback_with_the_token(read, place):
    config = read(f"{place}.yaml")
    (head,) = [c for c in config["head_start_ray_commands"] if " start " in c]
    (worker,) = [c for c in config["worker_start_ray_commands"] if " start " in c]
    for line in (head, worker):
        assert "RAY_AUTH_MODE=token ray start" in line
    started = arguments(scripts.start, shlex.split(head.split("ray start", 1)[1]))
    assert started["dashboard_host"] == "127.0.0.1"
    assert started["num_cpus"] == 0
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    joining = arguments(scripts.start, shlex.split(worker.split("ray start", 1)[1]))
    assert joining["address"] == "$RAY_HEAD_IP:6379"
    mounts = config["file_mounts"]
    assert mounts["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    every_setup = [config["setup_commands"]]
    every_setup.append(config["available_node_types"]["gpu"]["worker_setup_commands"])
    for setup in every_setup:
        assert any("RAY_AUTH_MODE=token" in line for line in setup)


@pytest.mark.parametrize("place", LAUNCHER)
def test_ray_up_mounts_files_that_stand_in_the_tree(read, root, place):
    mounts = read(f"{place}.yaml")["file_mounts"].values()
    assert all((root / source).exists() for source in mounts if not source.startswith("~"))


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_hold_kuberays_fields_only(read, name):
    manifest = read(f"{name}.yaml")
    spec = manifest["spec"]
    cluster = spec[KUBERAY[name]]
    assert manifest["apiVersion"] == "ray.io/v1"
    assert set(spec) <= FIELDS[manifest["kind"]]
    assert set(cluster) <= FIELDS["cluster"]
    assert set(cluster["autoscalerOptions"]) <= FIELDS["autoscaler"]
    assert set(cluster["headGroupSpec"]) <= FIELDS["head"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= FIELDS["group"]
        assert 0 <= group["minReplicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_clusters_want_a_token_and_no_privilege(read, name):
    cluster = read(f"{name}.yaml")["spec"][KUBERAY[name]]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in pod["containers"]:
            held = container["securityContext"]
            assert held["allowPrivilegeEscalation"] is False
            assert held["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"] == container["resources"]["requests"]
            names = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_the_serve_config_is_one_that_ray_serve_and_our_application_take(read):
    config = ServeDeploySchema.model_validate(
        yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    )
    (application,) = config.applications
    assert application.import_path == "serve.app:build"
    args = ServeArgs.model_validate(application.args)
    # Beyond loopback the application itself wants keys, if it is told where it listens.
    assert args.host == config.http_options.host
    assert args.port == config.http_options.port
    assert args.keys_file is not None


def test_the_served_paths_are_those_that_the_job_makes(read):
    job = parse("pipeline", shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])[3:])
    served = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    args = served["applications"][0]["args"]
    assert args["index"] == f"{job.out}/index"
    assert args["encoder"] == f"{job.out}/encoder"


def test_the_job_asks_for_what_a_worker_has(read):
    spec = read("rayjob.yaml")["spec"]
    placement = parse("pipeline", shlex.split(spec["entrypoint"])[3:]).recipe.placement
    worker = spec["rayClusterSpec"]["workerGroupSpecs"][1]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert placement.gpus_per_actor <= int(limits["nvidia.com/gpu"])
    assert placement.train_workers <= worker["maxReplicas"]


@pytest.mark.parametrize("name", COMMENTED)
def test_every_command_shown_is_one_that_its_program_takes(root, name):
    shown = commands((root / "cluster" / name).read_text())
    assert shown
    for words in shown:
        words = [word for word in words if word != "RAY_AUTH_MODE=token"]
        match words:
            case ["ray", "job", "submit", *rest]:
                parsed = arguments(submit, rest)
                assert parsed["working_dir"] == "."
                module, recipe = parsed["entrypoint"][2], parsed["entrypoint"][3:]
                assert parse(module.removeprefix("jobs."), recipe).data
            case ["ray", command, *rest]:
                arguments(scripts.cli.commands[command], rest)
                assert all((root / word).exists() for word in rest if word.startswith("cluster/"))
            case ["python", "-m", module, *rest]:
                parse(module.removeprefix("jobs."), rest)
            case ["kubectl" | "docker", *rest]:
                assert all((root / word).exists() for word in rest if word.startswith("cluster/"))
            case ["export", *pairs]:
                assert all("=" in pair for pair in pairs)


def test_every_file_says_where_it_was_tried(root):
    for name in (*FILES, "Dockerfile"):
        comment = (root / "cluster" / name).read_text().split("\n\n")[0]
        assert "Where it was tried: " in re.sub(r"\n# ?", " ", comment), name


def test_versions_are_the_pinned_ones(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    text = "".join((root / "cluster" / name).read_text() for name in COMMENTED)
    assert set(re.findall(r"rayproject/ray:([\d.]+)", text)) == {ray.__version__}
    assert set(re.findall(r"rayVersion: ([\d.]+)", text)) == {ray.__version__}
    assert f"ray[data,train,serve]=={ray.__version__}" in project["dependencies"]
    assert set(re.findall(r"bixse:([\d.]+)-", text)) == {project["version"]}
    extras = set(re.findall(r"(?:--extra |EXTRA=)(\w+)", text))
    assert extras == {"cpu", "gpu"} & set(project["optional-dependencies"])
    for package in ("uv", "s3fs", "gcsfs", "boto3"):
        assert len(set(re.findall(rf"\b{package}==([\d.]+)", text))) == 1


def test_the_image_copies_what_stands_in_the_tree(root):
    text = (root / "cluster" / "Dockerfile").read_text()
    sources = re.findall(r"^COPY \S+ (\S+) ", text, re.MULTILINE)
    assert {"pyproject.toml", "bixse", "jobs", "serve"} == set(sources)
    assert all((root / source).exists() for source in sources)
    ignored, *kept = (root / ".dockerignore").read_text().split()
    assert ignored == "*"
    assert {f"!{source}" for source in sources} <= set(kept)


def test_the_network_policy_covers_the_pods_and_opens_the_ports_that_the_service_has(read):
    spec = read("networkpolicy.yaml")["spec"]
    assert spec["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert spec["policyTypes"] == ["Ingress"]
    served = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])["http_options"][
        "port"
    ]
    for rule in spec["ingress"]:
        assert rule["from"]
        assert {port["port"] for port in rule.get("ports", [])} <= {8265, served}


def test_the_network_policy_lets_the_pod_in_that_submits_the_job(read):
    """By a label that it has: KubeRay puts its own on the Job alone."""
    rules = read("networkpolicy.yaml")["spec"]["ingress"]
    label = {"job-name": read("rayjob.yaml")["metadata"]["name"]}
    submits = {"podSelector": {"matchLabels": label}}
    assert {"from": [submits], "ports": [{"port": 8265, "protocol": "TCP"}]} in rules
