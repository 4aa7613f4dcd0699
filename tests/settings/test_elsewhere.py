"""Names that other projects use for a setting, and names that look like one, are told of, not passed over; the
environment of everybody's shell is left alone."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lever_plus import config
from lever_plus.settings import elsewhere, former, names
from open_mmicl.errors import UsageError

OURS = sorted(names.known())
READS = frozenset(OURS)
EVERYDAY = """
    SHELL HOME USER LOGNAME HOSTNAME NAME PWD OLDPWD PATH MANPATH TERM COLUMNS LINES LANG LANGUAGE LC_ALL TZ MAIL
    EDITOR PAGER DISPLAY SHLVL _ PS1 HISTSIZE TMUX SSH_AUTH_SOCK SSH_CLIENT SSH_CONNECTION XDG_RUNTIME_DIR
    DBUS_SESSION_BUS_ADDRESS GTK_MODULES QT_IM_MODULE LS_COLORS LESSOPEN TMPDIR TEMP TMP TERM_PROGRAM
    VSCODE_IPC_HOOK_CLI WSL_DISTRO_NAME WT_SESSION CI GITHUB_SHA GITHUB_TOKEN RUNNER_TEMP ImageOS JAVA_HOME_11_X64
    GITLAB_CI CI_JOB_TOKEN BUILD_NUMBER JOB_NAME NODE_NAME WORKSPACE EXECUTOR_NUMBER SLURM_NTASKS SLURM_GPUS
    SLURM_JOB_ID PBS_NUM_PPN NCPUS OMPI_COMM_WORLD_RANK PMI_RANK MODULEPATH CUDA_VISIBLE_DEVICES CUDA_HOME
    NVIDIA_VISIBLE_DEVICES NV_CUDNN_VERSION LD_LIBRARY_PATH NCCL_DEBUG NCCL_P2P_DISABLE GLOO_SOCKET_IFNAME TORCH_HOME
    TORCHELASTIC_RUN_ID PYTORCH_CUDA_ALLOC_CONF RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK
    NODE_RANK MASTER_ADDR MASTER_PORT OMP_NUM_THREADS MKL_NUM_THREADS NUMEXPR_NUM_THREADS MAX_JOBS
    TOKENIZERS_PARALLELISM TF_CPP_MIN_LOG_LEVEL XLA_FLAGS RAY_ADDRESS VLLM_USE_V1 HF_HOME HF_TOKEN HF_HUB_OFFLINE
    HF_ENDPOINT HUGGING_FACE_HUB_TOKEN TRANSFORMERS_CACHE WANDB_API_KEY WANDB_MODE MLFLOW_TRACKING_URI OPENAI_API_KEY
    CONDA_DEFAULT_ENV CONDA_PREFIX VIRTUAL_ENV PYTHONPATH PYTHONHASHSEED PIP_INDEX_URL JPY_PARENT_PID KERNEL_ID
    MPLBACKEND KUBERNETES_SERVICE_HOST REDIS_SERVICE_PORT DATABASE_URL POD_NAME container DOCKER_HOST COLAB_GPU
    KAGGLE_KERNEL_RUN_TYPE SM_MODEL_DIR SM_NUM_GPUS SM_CHANNEL_TRAIN AIP_MODEL_DIR RUNPOD_GPU_COUNT SPARK_HOME
    AWS_REGION http_proxy HTTPS_PROXY no_proxy SSL_CERT_FILE DEBUG VERBOSE LOG_LEVEL PORT HOST URL TOKEN PROFILE
    REGION VERSION RELEASE TARGET PLATFORM npm_config_user_agent BASH_FUNC_module%% NUMBER_OF_PROCESSORS
""".split()
WORD = st.sampled_from(sorted(elsewhere._OF_TRAINING | {word for name in OURS for word in name.split("_")}))


@pytest.mark.parametrize("name", sorted(elsewhere.ELSEWHERE))
def test_a_name_of_another_project_says_what_it_is_here(name: str) -> None:
    hint = elsewhere.ELSEWHERE[name]
    assert name not in READS and set(re.findall(r"[A-Z_0-9]{3,}", hint)) <= READS
    for spelt in (name, name.lower()):
        assert names.lines(READS, {spelt: "5"}, {}) == [f"warning: {spelt} is not a setting; did you mean {hint}?"]
    assert names.lines(READS, {name: ""}, {}) == []


@pytest.mark.parametrize("name", sorted(elsewhere.NOTHING))
def test_what_only_other_projects_have_says_what_is_done_here(name: str) -> None:
    (line,) = names.lines(READS, {name: "5"}, {name: "5"})
    assert line.startswith(f"warning: .env: {name} is not a setting; it is not read: ")
    assert not {name} & (READS | set(former.FORMER) | set(elsewhere.ELSEWHERE))


def test_the_environment_of_everybody_is_left_alone() -> None:
    assert names.lines(READS, dict.fromkeys(EVERYDAY, "x"), {}) == []


@given(st.lists(WORD, min_size=2, max_size=4))
def test_any_name_made_of_words_of_settings_is_told_wherever_it_is_set(words: list[str]) -> None:
    name = "_".join(words)
    if name in READS or name in former.FORMER or elsewhere.of_a_library(name):
        return
    for dotenv in ({}, {name: "1"}):
        told = names.lines(READS, {name: "1"}, dotenv)
        assert len(told) == 1 and name in told[0] and told[0].startswith("warning: ")


@given(st.sampled_from(OURS), st.sampled_from(sorted(elsewhere._OF_THE_FIELD)), st.booleans())
def test_a_setting_with_a_word_of_the_field_more_or_in_another_order_is_told(name: str, word: str, ahead: bool) -> None:
    turned = "_".join(reversed(name.split("_")))
    for slipped in (f"{word}_{name}" if ahead else f"{name}_{word}", turned):
        if slipped not in READS and slipped not in former.FORMER and not elsewhere.of_a_library(slipped):
            (line,) = names.lines(READS, {slipped: "1"}, {})
            assert slipped in line


@pytest.mark.parametrize("name", ["ACME_BATCH_SIZE", "CELERY_TASK_NAME", "DJANGO_LOG_FILE", "MYAPP_MODEL_PATH"])
def test_a_word_that_no_setting_has_says_that_a_name_is_another_programs(name: str) -> None:
    assert names.lines(READS, {name: "1"}, {}) == []
    assert len(names.lines(READS, {name: "1"}, {name: "1"})) == 1  # .env is ours


@pytest.mark.parametrize("name", "TEMPERATURE RANK_LOSS GROUP_SIZE TEMPS LOCAL_BATCH PATHS REWARD_TOKEN TERMS".split())
def test_no_setting_passes_in_dotenv_because_its_name_begins_like_a_librarys(name: str) -> None:
    (line,) = names.lines(READS, {}, {name: "1"})
    assert line.startswith(f"warning: .env: {name} ")


@pytest.mark.parametrize("name", "SEDE SEDD ESED SEEDZ NPRC NPROK STOPP MRM DELT RIVL TEID".split())
def test_a_slip_in_a_short_name_is_told(name: str) -> None:
    told = names.lines(READS, {name: "1"}, {})
    assert (told != []) == (name != "ESED")  # another first letter may be any word


def test_files_of_settings_refuse_such_names_with_the_same_words() -> None:
    for name, says in (("GRPO_TEMP", "ONLINE_TEMPERATURE"), ("EVAL_STEPS", "every epoch"), ("EPOCHS_RCE", "RCE_EPOCHS"),
                       ("RCE_TEMP_STRT", "RCE_TEMP_START"), ("FROBNICATE", "--help")):  # fmt: skip
        with pytest.raises(UsageError, match=f"exp9.env: {name} is not a setting; .*{says}"):
            names.check_file({name: 1}, "exp9.env")


def test_variables_that_a_models_yaml_names_are_settings(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "infer_model").mkdir(parents=True)
    yaml = "name: m\nserver: {url_variable: MY_SERVER, api_key_variable: MY_SECRET_WORD}\n"
    (tmp_path / "configs" / "infer_model" / "mine.yaml").write_text(yaml)
    (tmp_path / "configs" / "infer_model" / "damaged.yaml").write_text("a: [")
    dotenv = {"MY_SERVER": "http://x", "MY_SECRET_WORD": "s", "LVLM_SERVER_URLS": "http://y"}
    assert len(names.lines(READS, dotenv, dotenv)) == 2
    monkeypatch.chdir(tmp_path)
    assert names.lines(READS, dotenv, dotenv) == []
    assert config.config_dirs("infer_model")[1] == tmp_path / "configs" / "infer_model"
