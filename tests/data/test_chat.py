"""Conversations become what the tokenizer's chat template makes of them, token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.config.sections import DataSection
from fedforward.core.batches import IGNORED
from fedforward.core.errors import FedForwardError
from fedforward.data.sampler import collate
from tests.conftest import DEMO_MODEL
from tests.support.corpora import corpus, reader, write_rows

#: Templates in the ways in which models have them.
TEMPLATES = {
    "chatml": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "begins": "<s>{% for m in messages %}<h>{{ m.role }}</h>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>{% endif %}",
    "instructions": "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
    "[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}",
    "system first": "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = 'Be brief.' %}{% set rest = messages %}"
    "{% endif %}{{ first }}{% for m in rest %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant: {% endif %}",
    "tools": "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "{{ m.role }}> {% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}"
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}assistant> {% endif %}",
    "thinks": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}
USER, SYSTEM = ({"role": role, "content": "what is it?"} for role in ("user", "system"))


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TALKS = {
    "one turn": [USER, said("it is 3.")],
    "two turns": [USER, said("it is 3."), USER, said(" it is 4, “é”.\n")],
    "a system": [SYSTEM, USER, said("it is 3.")],
    "odd spaces": [{"role": "user", "content": "  what\n\n"}, said("  it\n")],
    "an open end": [USER, said("it is 3."), USER],
}
Tokenizer = Callable[[str | None], Any]


@pytest.fixture
def tokenizer() -> Tokenizer:
    from transformers import AutoTokenizer

    def make(template: str | None) -> Any:
        made = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
        made.chat_template = template
        return made

    return make


def talk_file(path: Path, *talks: Any, **more: Any) -> Path:
    return write_rows(path, [{"messages": talk, **more} for talk in talks])


def only(made: Any) -> Any:
    (example,) = made.clients[0]
    return example


def labels(example: Any) -> list[int]:
    row = collate([example]).labels[0]
    return [int(token) for token in row if token != IGNORED]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
def test_tokens_are_those_of_the_template(
    tmp_path: Path, tokenizer: Tokenizer, template: str, talk: str
) -> None:
    tok = tokenizer(TEMPLATES[template])
    messages = [m for m in TALKS[talk] if m["role"] != "system" or template != "instructions"]
    path = talk_file(tmp_path / "d.jsonl", messages, messages)
    example = only(corpus(path, tok, chat="messages"))
    last = max(n for n, m in enumerate(messages) if m["role"] == "assistant")
    whole = tok.apply_chat_template(messages[: last + 1], tokenize=True)["input_ids"]
    assert example.tokens.tolist() == whole
    before = tok.apply_chat_template(messages[:last], tokenize=True, add_generation_prompt=True)[
        "input_ids"
    ]
    # Where a token reaches from the prompt into the answer it is the answer's.
    assert whole[: example.prompt_length] == before[: example.prompt_length]
    assert example.prompt_length >= len(before) - 1
    assert example.reference == messages[last]["content"]
    counted = tok.decode(labels(example))
    assert counted.removesuffix("</s>").strip() == messages[last]["content"].strip()
    assert counted.endswith("</s>") == ("</s>" in TEMPLATES[template])


def test_all_answers_count_if_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    path = talk_file(tmp_path / "d.jsonl", *[TALKS["two turns"]] * 2)
    last, every = (only(corpus(path, tok, chat="messages", loss_on=how)) for how in ("last", "all"))
    assert np.array_equal(last.tokens, every.tokens)
    assert last.prompt_length == every.prompt_length and len(every.spans) == 2
    assert tok.decode(labels(every)) == "it is 3.</s> it is 4, “é”.\n</s>"
    short = {"loss_on": "all", "sequence_length": every.spans[0][1]}
    cut = only(corpus(path, tok, chat="messages", **short))
    assert tok.decode(labels(cut)) == "it is 3.</s>" and cut.reference == "it is 3."


def test_a_template_that_changes_earlier_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["thinks"])
    talk = [USER, said("<think>x</think>it is 3."), USER, said("<think>y</think>it is 4.")]
    path = talk_file(tmp_path / "d.jsonl", talk, talk)
    example = only(corpus(path, tok, chat="messages"))
    assert tok.decode(labels(example)) == "<think>y</think>it is 4.</s>"
    with pytest.raises(FedForwardError, match=r"renders message 2 in another way when mor"):
        corpus(path, tok, chat="messages", loss_on="all")


SHAREGPT = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "it is 3."}]


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"messages": [USER, said("it is 3.")]}, "messages"),
        ({"talk": [USER, said("it is 3.")]}, "talk"),
        ({"rows": {"m": [USER, said("it is 3.")]}}, "rows.m"),
        ({"conversations": SHAREGPT}, "conversations"),
        ({"prompt": "what is it?", "completion": "it is 3."}, "prompt-completion"),
        ({"prompt": [USER], "completion": [said("it is 3.")]}, "prompt-completion"),
        ({"instruction": "what is it?", "input": "", "output": "it is 3."}, "alpaca"),
        ({"instruction": "what is it?", "output": "it is 3."}, "alpaca"),
        ({"messages": '[{"role": "user", "content": "what is it?"}, '
          '{"role": "assistant", "content": "it is 3."}]'}, "messages"),
        ({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "what is it?"}]},
            {**said("it is 3."), "tool_calls": None},
        ]}, "messages"),
    ],
)  # fmt: skip
def test_every_form_of_a_conversation(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], chat: str
) -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    path = write_rows(tmp_path / "d.jsonl", [row, row])
    example = only(corpus(path, tok, chat=chat))
    wanted = "<|user|>what is it?</s>\n<|assistant|>it is 3.</s>\n"
    assert tok.decode(example.tokens) == wanted
    found = reader(path).chat
    usual = ("messages", "conversations", "prompt-completion")
    assert found == (chat if chat in usual and not isinstance(row.get("messages"), str) else None)


def test_an_input_and_a_system_message_belong_to_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be brief."}
    example = only(corpus(write_rows(tmp_path / "a.jsonl", [row] * 2), tok, chat="alpaca"))
    wanted = "<|system|>Be brief.</s>\n<|user|>Add.\n\n1, 2</s>\n<|assistant|>3</s>\n"
    assert tok.decode(example.tokens) == wanted
    path = write_rows(
        tmp_path / "b.jsonl", [{"conversations": SHAREGPT, "system": "Be brief."}] * 2
    )
    example = only(corpus(path, tok, chat="conversations"))
    assert tok.decode(example.tokens).startswith("<|system|>Be brief.</s>\n<|user|>what")


TOOLS = [{"type": "function", "function": {"name": "add", "limits": [5, 2.50, 1e3, None]}}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"name": "add", "arguments": {"a": 1}}],
}


def test_tools_are_what_the_template_is_given(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import json

    tok = tokenizer(TEMPLATES["tools"])
    talk = [USER, CALL, {"role": "tool", "content": "3"}, said("it is 3.")]
    for tools in (TOOLS, json.dumps(TOOLS)):
        path = talk_file(tmp_path / "d.jsonl", talk, talk, tools=tools)
        example = only(corpus(path, tok, chat="messages", loss_on="all"))
        whole = tok.apply_chat_template(talk, tools=TOOLS, tokenize=True)["input_ids"]
        assert example.tokens.tolist() == whole
        assert '"add"' in tok.decode(labels(example))
    with pytest.raises(FedForwardError, match=r"line \d of .* has tools, and the chat template of"):
        corpus(path, tokenizer(TEMPLATES["chatml"]), chat="messages")


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ("hello", "holds text, and a conversation is a list of messages"),
        ({"role": "user"}, "holds an object with the keys role, and a conversation is a list"),
        (["hello"], "message 1 of messages is text, and a message is an object"),
        ([{"text": "x"}], "message 1 of messages has no role"),
        ([USER, {"from": "wizard", "value": "x"}], "message 2 of messages is from 'wizard', which"),
        ([USER, {"role": "assistant"}], "message 2 of messages says nothing"),
        ([USER, said(3)], "its content is a number"),  # type: ignore[arg-type]
        ([USER, said([{"type": "image"}])], "has a part that is no text (image)"),  # type: ignore[arg-type]
        ([USER, said("\ud800")], "half of a surrogate pair"),
        ([USER, said([{"type": "text", "text": "\ud800"}])], "half of a surrogate pair"),  # type: ignore[arg-type]
        ("[3", "begins as JSON and is none"),
    ],
)
def test_conversations_that_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, talk: Any, words: str
) -> None:
    path = talk_file(tmp_path / "d.jsonl", talk, talk)
    with pytest.raises(FedForwardError) as caught:
        corpus(path, tokenizer(TEMPLATES["chatml"]), chat="messages")
    assert words in str(caught.value) and str(caught.value).startswith("line ")


def test_conversations_without_an_answer_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    good = TALKS["one turn"]
    path = talk_file(tmp_path / "d.jsonl", [USER], [], None, [said("x")], *[good] * 6)
    held = talk_file(tmp_path / "held.jsonl", good)
    made = corpus(path, tok, chat="messages", evaluation={"source": str(held)})
    assert made.dropped == 4 and len(made.clients[0]) == 6


def test_what_a_template_refuses_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = talk_file(tmp_path / "d.jsonl", *[TALKS["a system"]] * 2)
    with pytest.raises(FedForwardError) as caught:
        corpus(path, tokenizer(TEMPLATES["instructions"]), chat="messages")
    for word in ("line ", "refuses the conversation (system, user", "Only user and assistant"):
        assert word in str(caught.value)


def test_templates_of_files_and_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = talk_file(tmp_path / "d.jsonl", *[TALKS["one turn"]] * 2)
    with pytest.raises(FedForwardError, match=r"needs a chat template, and the tokenizer of"):
        corpus(path, tokenizer(None), chat="messages")
    file = tmp_path / "template.jinja"
    with pytest.raises(FedForwardError, match=r"data\.chat_template = .* cannot be read: No such"):
        corpus(path, tokenizer(None), chat="messages", chat_template=str(file))
    file.write_text(TEMPLATES["system first"], encoding="utf-8")
    tok = tokenizer(None)
    example = only(corpus(path, tok, chat="messages", chat_template=str(file)))
    assert tok.decode(example.tokens) == "Be brief.user: what is it?assistant: it is 3."


def test_numbers_of_several_fields_are_as_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    for chat, names in (
        ("alpaca", ("instruction", "output")),
        ("prompt-completion", ("prompt", "completion")),
    ):
        for number in ("1.10", "1e5", "12345678901234567890.50"):
            line = f'{{"{names[0]}": "n", "{names[1]}": {number}}}'
            path = write_rows(tmp_path / "d.jsonl", [line, line])
            assert tok.decode(labels(only(corpus(path, tok, chat=chat)))) == f"{number}</s>"


def test_what_weighs_nothing_is_not_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    talk = [USER, said("good"), USER, {**said("BAD"), "weight": 0}]
    path = talk_file(tmp_path / "d.jsonl", talk, talk)
    for how in ("last", "all"):
        example = only(corpus(path, tok, chat="messages", loss_on=how))
        assert tok.decode(labels(example)) == "good</s>"


def test_blank_answers_are_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    talk = [USER, said("good"), USER, said("  ")]
    example = only(corpus(talk_file(tmp_path / "d.jsonl", talk, talk), tok, chat="messages"))
    assert tok.decode(labels(example)) == "good</s>"


def test_an_answer_may_hold_an_end_and_begin_like_its_prompt(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    tok = tokenizer(plain + "{% if add_generation_prompt %}[assistant][think]{% endif %}")
    for answer in ("Write </s> in HTML. That is all.", "[table][tr]", "[thanks] ok"):
        talk = [USER, said(answer)]
        example = only(corpus(talk_file(tmp_path / "d.jsonl", talk, talk), tok, chat="messages"))
        assert tok.decode(labels(example)) == f"{answer}[end]"


def test_the_system_of_a_row_is_never_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    row = {"prompt": "a", "completion": "b", "system": "Be brief."}
    path = write_rows(tmp_path / "d.jsonl", [row, row])
    example = only(corpus(path, tok, chat="prompt-completion"))
    assert tok.decode(example.tokens).startswith("<|system|>Be brief.</s>")
    for system, words in ((["Be kind"], "holds a list of 1"), ({"a": "b"}, "holds an object")):
        path = talk_file(tmp_path / "d.jsonl", *[TALKS["one turn"]] * 2, system=system)
        with pytest.raises(FedForwardError, match=words):
            corpus(path, tok, chat="messages")
    path = talk_file(tmp_path / "d.jsonl", *[TALKS["a system"]] * 2, system="Be brief.")
    with pytest.raises(FedForwardError, match="a field system and a system message"):
        corpus(path, tok, chat="messages")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [{"role": "user", "content": "A", "content": "B"}]}', "'content' more than"),
        ('{"messages": [{"role": "user", "text": "A"}]}', "message 1 of messages says nothing"),
        ('{"messages": [{"from": "human", "value": "a", "content": "Z"}]}', "both value and cont"),
        ('{"messages": [{"from": {"a": 1}, "value": "a"}]}', "which is not known"),
        ('{"messages": [], "functions": [{"name": "f"}]}', "has functions, the earlier form"),
    ],
)
def test_what_could_be_lost_in_a_conversation_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, line: str, words: str
) -> None:
    path = write_rows(tmp_path / "d.jsonl", [line, line])
    with pytest.raises(FedForwardError, match=words):
        corpus(path, tokenizer(TEMPLATES["chatml"]), chat="messages")


def test_a_template_that_is_none_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = talk_file(tmp_path / "d.jsonl", *[TALKS["one turn"]] * 2)
    file = tmp_path / "template.jinja"
    for text, words in (
        ("{% for m in messages %}", "is no Jinja template"),
        ("", "is no chat temp"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(FedForwardError, match=words):
            corpus(path, tokenizer(None), chat="messages", chat_template=str(file))


def test_a_template_has_one_date_on_all_days(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    path = talk_file(tmp_path / "d.jsonl", *[TALKS["one turn"]] * 2)
    tok = tokenizer(template)
    example = only(corpus(path, tok, chat="messages"))
    assert tok.decode(example.tokens).startswith("26 Jul 2024|what")
    assert "asks for today's date" in caplog.text


def test_chat_and_templates_exclude_each_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for written in ({"prompt": "{q}"}, {"answer": "{a}"}, {"label_words": {"0": "a", "1": "b"}}):
        with pytest.raises(ValueError, match=r"chat = 'messages' makes prompts and answers"):
            DataSection(source="d.jsonl", chat="messages", **written)  # type: ignore[arg-type]
    path = talk_file(tmp_path / "d.jsonl", *[TALKS["one turn"]] * 2)
    with pytest.raises(FedForwardError, match=r"model\.head = 'classification' need data\.prompt"):
        reader(path).classes()
    plain = corpus(
        path,
        tokenizer(None),
        prompt="{messages[0].content}",
        answer=" {messages[-1].content}",
    )
    assert only(plain).reference == " it is 3."


def test_the_example_is_rendered(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tok = tokenizer(TEMPLATES["begins"])
    path = talk_file(tmp_path / "d.jsonl", *[TALKS["one turn"]] * 2)
    first = corpus(path, tok, chat="messages").example
    assert first.text == "<s><h>user</h>what is it?</s><h>assistant</h>"
    assert tok.decode(first.tokens) == first.text and first.expected == "it is 3."
    asked = corpus(path, tok, chat="messages", example="Why?").example
    assert asked.text == "<s><h>user</h>Why?</s><h>assistant</h>" and asked.expected is None
    assert tok.decode(asked.tokens) == asked.text
