"""Conversations: prompts beside transformers' apply_chat_template, and templates that mean no good."""

import datetime
import io
import json
import re
import subprocess
import sys
import time

import psutil
import pytest
from conftest import Scripted
from test_tokenizer import make, saved
from transformers import AutoTokenizer

from helpers import SamplingParams
from helpers.errors import InputError, ModelError, WorkerError
from helpers.model import chat, chat_process
from helpers.model.chat import TIME_LIMIT_S, ChatTemplate
from helpers.model.tokenizer import load_tokenizer

# In the style of public models, each with what is peculiar to it.
TEMPLATES = {
    # One rule for all roles.
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # A system message of its own where none is given.
    "smollm": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # A begin token for each pair of turns; roles must alternate; spaces as the model saw them.
    "llama-2": """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = '<<SYS>>\n' + messages[0]['content'] | trim + '\n<</SYS>>\n\n' %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = '' %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 %}
        {% set content = system_message + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + content | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    # Headers, a date, variables that are not always there, namespaces.
    "llama-3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set ns = namespace(count=0, system="") %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = ns.system ~ message.content | trim %}
{%- endfor %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" + ns.system + "<|eot_id|>" }}
{%- for message in messages if message.role != 'system' %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
{#- the number of messages: #}{{ ns.count }}""",
    "mistral": "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}",
    # Line ends in the template itself, which trim_blocks takes away; no begin token.
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    # Roles of other names; no system message.
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    # What the language can do and few templates use.
    "everything": """{%- macro turn(message) -%}
    {{- message | tojson }} {{ message.content | tojson(indent=2) }}
{%- endmacro %}
{%- for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- if not message.content %}{% continue %}{% endif %}
    {{- turn(message) }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% endif %}
    {%- set about = dict(role=message.role, n=loop.index) %}
    {{- about | tojson(sort_keys=true, separators=(',', ':')) }}{{ cls_token }}{{ tools is none }}{{ unknown }}
{%- endfor %}
""",
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
USER, ANSWER = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Nobody."}
SYSTEM = {"role": "system", "content": "Be brief. "}
CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": " <b>naïve</b> 'quotes' \"你好\"\n\n</s> <|im_end|> "}],
    "system and turns": [SYSTEM, USER, ANSWER, USER],
    "blank": [{"role": "user", "content": ""}, ANSWER, USER],
    "answer last": [USER, ANSWER],
    "twice": [USER, USER],
}


def model(folder, template, kind="byte-level", **config):
    backend = make(kind)
    backend.add_special_tokens(SPECIAL)
    folder = saved(folder, backend, {"bos_token": "<s>", **config})
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(params=TEMPLATES)
def template(request):
    return TEMPLATES[request.param]


def in_process(source, messages, **tokens):
    """What the template's process answers."""
    return chat_process.render(source, tokens, messages)


def test_prompts_are_those_of_apply_chat_template(tmp_path, template):
    folder = model(tmp_path, template)
    reference, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    compared = 0
    for messages in CONVERSATIONS.values():
        try:
            text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's own TemplateError, which transformers lets through
            refused = str(error)
            assert in_process(template, messages, **ours.chat_template.tokens) == ("refused", refused)
            continue
        assert in_process(template, messages, **ours.chat_template.tokens) == ("rendered", text)
        ids = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert ours.encode(text, add_special_tokens=False) == ids["input_ids"]
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "sentencepiece-legacy", "unigram", "word-piece"])
def test_an_engine_takes_the_prompt_that_transformers_makes_and_begins_it_once(tmp_path, kind):
    folder = model(tmp_path, TEMPLATES["mistral"], kind)
    reference = AutoTokenizer.from_pretrained(folder)
    engine = Scripted([7, 8, 2], tokenizer=load_tokenizer(folder))
    messages = [USER, ANSWER, {"role": "user", "content": "naïve 你"}]
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    answer = engine.chat(messages, SamplingParams(temperature=0, max_tokens=5))
    assert answer.prompt_token_ids == ids["input_ids"] == engine.tokenize_chat(messages)
    assert ids["input_ids"].count(1) == 1  # <s>
    assert (answer.token_ids, answer.finish_reason) == ([7, 8], "stop")
    streamed = list(engine.stream_chat(messages, SamplingParams(temperature=0, max_tokens=5)))
    assert [token.token_id for token in streamed] == [7, 8]
    assert "".join(token.text for token in streamed) == answer.text


# ---- where the template is, and what it ends with ---------------------------------------------------------


PLAIN = "{{ messages[0].content }}"
NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": PLAIN}]


@pytest.mark.parametrize(
    "config", [{"chat_template": PLAIN}, {"chat_template": NAMED}], ids=["a text", "several by name"]
)
def test_a_template_may_stand_in_tokenizer_config(tmp_path, config):
    folder = saved(tmp_path, make("byte-level"), config)
    ours = load_tokenizer(folder).chat_template
    assert ours.render([USER]) == USER["content"]
    assert ours.render([USER]) == AutoTokenizer.from_pretrained(folder).apply_chat_template([USER], tokenize=False)
    (folder / "chat_template.jinja").write_text("the file")
    assert load_tokenizer(folder).chat_template.render([USER]) == "the file"
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template([USER], tokenize=False) == "the file"


@pytest.mark.parametrize("source", [7, True, [1], [{"name": "default"}], [{"name": "default", "template": 7}]])
def test_a_template_of_another_form_is_refused(tmp_path, source):
    with pytest.raises(ModelError):
        load_tokenizer(saved(tmp_path, make("byte-level"), {"chat_template": source}))


@pytest.mark.parametrize("config", [{}, {"chat_template": None}, {"chat_template": NAMED[:1]}])
def test_a_model_without_a_template_takes_no_conversation(tmp_path, config):
    engine = Scripted([7], tokenizer=load_tokenizer(saved(tmp_path, make("byte-level"), config)))
    for call in (engine.chat, engine.stream_chat, engine.tokenize_chat):
        with pytest.raises(InputError, match="no chat template") as refused:
            call([USER])
        assert refused.value.cause and refused.value.fix


def test_the_tokenizers_end_token_ends_a_turn_beside_those_of_the_configuration(tmp_path):
    folder = model(tmp_path, TEMPLATES["chatml"], eos_token="<|im_end|>")
    tokenizer = load_tokenizer(folder)
    turn_end = tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]
    greedy = SamplingParams(temperature=0, max_tokens=5)
    for end_ids in ((2,), (2, turn_end)):
        engine = Scripted([7, turn_end], end_ids, tokenizer)
        assert engine.end_ids == (2, turn_end)
        answer = engine.chat([USER], greedy)
        assert (answer.token_ids, answer.finish_reason) == ([7], "stop")
    (folder / "chat_template.jinja").unlink()  # a base model ends where its configuration says, as in transformers
    assert Scripted([7], (2,), load_tokenizer(folder)).end_ids == (2,)


def test_tokens_that_only_special_tokens_map_names_are_known_to_the_template(tmp_path):
    backend = make("byte-level")
    folder = saved(tmp_path, backend, special_tokens_map={"pad_token": {"content": "<unk>"}, "bos_token": "<s>"})
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ pad_token }}{{ eos_token }}")
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template([USER], tokenize=False)
    assert load_tokenizer(folder).chat_template.render([USER]) == expected == "<s><unk></s>"


# ---- what is no conversation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        [],
        (),
        "Hello",
        None,
        7,
        USER,
        ["Hello"],
        [None],
        [{}],
        [{"role": "user"}],
        [{"content": "Hello"}],
        [{**USER, "name": "Mia"}],
        [{"role": "robot", "content": "Hello"}],
        [{"role": None, "content": "Hello"}],
        [{"role": ["user"], "content": "Hello"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        [{"role": "user", "content": b"Hello"}],
        [[USER]],
        {"messages": [USER]},
        pytest.param(iter([USER]), id="an iterator"),
    ],
    ids=repr,
)
def test_what_is_no_conversation_is_refused_before_anything_runs(messages, monkeypatch):
    monkeypatch.setattr(chat.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(InputError) as refused:
        ChatTemplate("{{ messages }}", {}).render(messages)
    assert refused.value.fix


def test_half_a_character_in_a_message_is_an_input_error(tmp_path):
    engine = Scripted([7], tokenizer=load_tokenizer(model(tmp_path, PLAIN)))
    with pytest.raises(InputError, match="half character"):
        engine.chat([{"role": "user", "content": "a \ud83d"}])


def test_a_conversation_without_a_prompt_is_refused(tmp_path):
    engine = Scripted([7], tokenizer=load_tokenizer(model(tmp_path, "")))
    with pytest.raises(InputError, match="no chat template"):
        engine.chat([USER])
    engine = Scripted([7], tokenizer=load_tokenizer(model(tmp_path, "{# nothing #}")))
    with pytest.raises(InputError, match="empty"):
        engine.chat([USER])


def test_what_a_template_refuses_is_told_in_its_words():
    template = ChatTemplate(TEMPLATES["gemma"], {"bos_token": "<s>"})
    with pytest.raises(InputError, match="System role not supported") as refused:
        template.render([SYSTEM, USER])
    assert "system message" in refused.value.fix
    with pytest.raises(InputError, match=r"\\x1b\[31m"):  # a terminal would obey it
        raise _spelled(ChatTemplate("{{ raise_exception('\x1b[31m') }}", {}))
    with pytest.raises(InputError):
        ChatTemplate("{{ raise_exception('') }}", {}).render([USER])


def _spelled(template):
    try:
        template.render([USER])
    except InputError as error:
        return InputError(str(error))


# ---- templates that mean no good --------------------------------------------------------------------------

BROKEN = {
    "no syntax": "{% for message in messages %}",
    "unknown tag": "{% fetch 'http://example.org' %}",
    "undefined": "{{ messages[0].contents.strip() }}",
    "a sum of unlike things": "{{ messages[0].content + 1 }}",
    "a file": "{% include '/etc/hostname' %}",
    "an import": "{% import 'os' as os %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 // 0 }}",
    "a long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "a changed list": "{{ messages.append(1) }}",
    "too long": "{% for i in range(50000) %}{{ 'x' * 1000 }}{% endfor %}",
}
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__.os }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '%s' | format(messages.__class__) }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{% set ns = namespace(__call__=1) %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
    "{{ dict.mro() }}",
    "{{ dict.__base__ }}",
    "{{ environment.compile('1') }}",
]


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_template_that_cannot_be_rendered_is_told_with_cause_and_fix(source):
    with pytest.raises(ModelError, match="gives no prompt") as refused:
        ChatTemplate(source, {}).render([USER])
    assert refused.value.cause and refused.value.fix and len(str(refused.value)) < 1000


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing_of_python(source):
    outcome, text = in_process(source, [USER])
    assert outcome == "failed" or not any(
        word in text for word in ("<class", "<module", "<built-in", "<function", "uid=")
    ), text


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",  # Python's own loops
        "{{ 9 ** (9 ** 9) }}",  # one call of C
    ],
)
def test_a_template_that_does_not_end_is_ended(source, monkeypatch):
    monkeypatch.setattr(chat, "TIME_LIMIT_S", 3.0)
    start = time.monotonic()
    with pytest.raises(ModelError, match="not done after 3 s"):
        ChatTemplate(source, {}).render([USER])
    assert time.monotonic() - start < 60


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells another process's limits")
def test_a_template_whose_reader_was_killed_does_not_run_for_ever():
    with subprocess.Popen([sys.executable, "-m", "helpers.model.chat_process"], stdin=subprocess.PIPE) as process:
        deadline, limit = time.monotonic() + 20, psutil.RLIM_INFINITY
        while limit == psutil.RLIM_INFINITY and time.monotonic() < deadline:
            time.sleep(0.05)
            limit, _ = psutil.Process(process.pid).rlimit(psutil.RLIMIT_CPU)
        process.kill()
    assert TIME_LIMIT_S <= limit <= 60


@pytest.mark.parametrize("source", ["{{ ('x' * 10 ** 11) | length }}", "{{ 'x' | center(10 ** 11) | length }}"])
def test_a_template_that_takes_all_memory_gets_none(source):
    with pytest.raises(ModelError, match="MemoryError|OverflowError"):
        ChatTemplate(source, {}).render([USER])


@pytest.mark.parametrize(("number", "kind"), [(9, WorkerError), (15, WorkerError), (11, ModelError), (6, ModelError)])
def test_a_template_is_blamed_for_a_crash_and_not_for_a_kill_from_outside(monkeypatch, number, kind):
    """As the system kills where memory runs out."""

    def ended(command, **_):
        raise subprocess.CalledProcessError(-number, command, stderr=b"")

    monkeypatch.setattr(subprocess, "run", ended)
    with pytest.raises(kind):
        ChatTemplate("Hello", {}).render([{"role": "user", "content": "Hello"}])


def test_the_date_is_todays():
    outcome, text = in_process("{{ strftime_now('%Y') }}", [USER])
    assert (outcome, text) == ("rendered", str(datetime.datetime.now().year))


def test_a_template_is_rendered_whatever_files_lie_in_the_current_folder(tmp_path, monkeypatch):
    for name in ("json.py", "jinja2.py", "helpers.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert ChatTemplate("{{ messages | tojson }}", {}).render([USER]) == json.dumps([USER])


def test_a_template_is_rendered_whatever_python_prints_when_it_starts_and_in_whatever_encoding(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('Welcome to our cluster', end='')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONIOENCODING", "utf-16")
    assert ChatTemplate("{{ messages | tojson }}", {}).render([USER]) == json.dumps([USER])


def test_a_conversation_in_a_terminal(tmp_path, monkeypatch, capsys):
    """Each answer is a part of the conversation that the next one is asked for with."""
    from helpers.cli import main

    tokenizer = load_tokenizer(model(tmp_path, "{% for message in messages %}{{ message.content }}|{% endfor %}"))
    engine = Scripted([*tokenizer.encode(" a river.", False), 2], tokenizer=tokenizer)
    prompts, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, *more, **named: prompts.append(text) or encode(text))
    monkeypatch.setattr("helpers.engine.load", lambda name: engine)
    typed = iter(["Once", "Go on"])

    def type_a_line(_):
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_a_line)
    assert main(["chat", "an engine", "--temperature", "0", "--stop", "river", "--stop", "?"]) == 0
    assert prompts == ["Once|", "Once| a |Go on|"]
    assert capsys.readouterr().out == " a \n a \n\n"
    assert engine.closed


@pytest.mark.parametrize(
    ("standard_input", "words"),
    [
        (None, "nobody to talk with"),
        (io.TextIOWrapper(io.BytesIO(b"h\xff\n"), encoding="utf-8"), "half character"),
    ],
)
def test_a_terminal_that_sends_no_text_is_told(tmp_path, monkeypatch, capsys, standard_input, words):
    from helpers.cli import main

    tokenizer = load_tokenizer(model(tmp_path, "{% for message in messages %}{{ message.content }}{% endfor %}"))
    monkeypatch.setattr("helpers.engine.load", lambda name: Scripted([2], tokenizer=tokenizer))
    monkeypatch.setattr("sys.stdin", standard_input)
    assert main(["chat", "an engine"]) == 1
    assert re.search(words, capsys.readouterr().err)


# ---- the real model ---------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_real_models_prompts_and_answers_are_those_of_transformers():
    import torch
    from transformers import AutoModelForCausalLM

    from helpers import BuildRecipe, load
    from helpers.model.checkpoint import find_checkpoint

    folder = find_checkpoint("smollm2").folder
    reference = AutoTokenizer.from_pretrained(folder)
    recipe = BuildRecipe(model="smollm2", backend="pytorch", max_batch_size=1, max_input_len=256, max_seq_len=320)
    with load(recipe) as engine:
        for messages in CONVERSATIONS.values():
            expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert engine.tokenize_chat(messages) == expected["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = reference.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
        answer = engine.chat(messages, SamplingParams(temperature=0, max_tokens=40))
        assert answer.finish_reason == "stop" and [*answer.token_ids, *engine.end_ids] == output.tolist()
        assert answer.text == reference.decode(output, skip_special_tokens=True)
