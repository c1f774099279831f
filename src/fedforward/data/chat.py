"""Conversations: their forms in data sets, and their text by the tokenizer's own chat template.

Known are messages with `role` and `content` (OpenAI), turns with `from` and `value` (ShareGPT), the
fields `prompt` and `completion`, and the fields `instruction`, `input` and `output` (Alpaca).
"""

import datetime
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home
from fedforward.data.readers import CONVERSATIONS, parse_json
from fedforward.data.values import Number, kind_of, plain, text_of

LOGGER = logging.getLogger("fedforward.data")
#: What a template is told that the date is: the default of those that ask for it.
DATE = datetime.date(2024, 7, 26)
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
#: Values of `data.chat` for forms of several fields: those that must be there, and the others.
FORMS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpaca": (("instruction", "output"), ("input", "system")),
    "prompt-completion": (("prompt", "completion"), ()),
}
#: Fields that hold conversations under their usual names, and say by being there what they are.
USUAL = CONVERSATIONS
#: Fields beside a conversation that belong to it.
_TOOLS, _SYSTEM, _FUNCTIONS = "tools", "system", "functions"
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: each with a role and what it says, in order.
        tools: what an assistant may call, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def answered(self) -> list[int]:
        """The places of the assistant's messages that say something after another message.

        What has `weight` 0, as in files for OpenAI, is not learnt.
        """
        return [
            n
            for n, message in enumerate(self.messages)
            if n
            and message["role"] == ASSISTANT
            and message.get("weight") != 0
            and (str(message.get("content") or "").strip() or message.get("tool_calls"))
        ]


def detect(columns: Sequence[str], sample: Mapping[str, Any]) -> str | None:
    """The value of `data.chat` that a data set asks for by its fields, or None.

    Args:
        columns: its fields.
        sample: its first row.
    """
    for name in USUAL:
        value = sample.get(name)
        if name in columns and isinstance(value, list) and value and isinstance(value[0], Mapping):
            return name
    wanted, _ = FORMS["prompt-completion"]
    return "prompt-completion" if all(name in columns for name in wanted) else None


def paths(chat: str) -> tuple[list[str], list[str]]:
    """What `data.chat` looks at: the paths that must be there, and those that may be."""
    if chat in FORMS:
        wanted, optional = FORMS[chat]
        return list(wanted), list(dict.fromkeys((*optional, _SYSTEM, _TOOLS, _FUNCTIONS)))
    return [chat], [_SYSTEM, _TOOLS, _FUNCTIONS]


def conversation(row: Mapping[str, Any], chat: str, where: str) -> Conversation:
    """The conversation of a row.

    Args:
        row: the values at `paths`.
        chat: as in `data.chat`.
        where: the row, for errors.

    Raises:
        FedForwardError: the fields hold no conversation.
    """
    tools = _tools(row.get(_TOOLS), where)
    if row.get(_FUNCTIONS):
        raise FedForwardError(
            f"{where} has functions, the earlier form of tools. Write them as tools, each "
            '{"type": "function", "function": …}, or rename the field.'
        )
    system = text_of(row.get(_SYSTEM), _SYSTEM, where) or ""
    begin: list[dict[str, Any]] = []
    if system.strip():
        begin = [{"role": "system", "content": system}]
    if chat == "alpaca":
        asked, more, answer = (
            text_of(row.get(name), name, where) or "" for name in ("instruction", "input", "output")
        )
        asked = f"{asked}\n\n{more}" if more.strip() else asked
        said = [{"role": "user", "content": asked}]
        said += [{"role": ASSISTANT, "content": answer}] if answer else []
        return Conversation([*begin, *said], tools)
    if chat == "prompt-completion":
        before = _part(row.get("prompt"), "prompt", "user", where)
        after = _part(row.get("completion"), "completion", ASSISTANT, where)
        return Conversation([*begin, *before, *after], tools)
    messages = _messages(row.get(chat), chat, where)
    if begin and messages and messages[0]["role"] == "system":
        raise FedForwardError(
            f"{where} has a field system and a system message in {chat}. Keep one of them."
        )
    return Conversation([*begin, *messages], tools)


def _part(value: Any, field: str, role: str, where: str) -> list[dict[str, Any]]:
    """A prompt or a completion: text, or messages."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [{"role": role, "content": text_of(value, field, where)}]
    return _messages(value, field, where)


def _messages(value: Any, field: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        # What has no lists (CSV, some Parquet files) holds them as JSON.
        try:
            value = parse_json(value)
        except json.JSONDecodeError as error:
            raise FedForwardError(
                f"{where}: the field {field} begins as JSON and is none: {error.msg}."
            ) from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise FedForwardError(
            f"{where}: the field {field} holds {kind_of(value)}, and a conversation is a list of "
            "messages. Name another field in data.chat, or leave it out and use data.prompt and "
            "data.answer."
        )
    return [_message(item, f"{where}, message {n} of {field}") for n, item in enumerate(value, 1)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise FedForwardError(
            f"{where} is {kind_of(item)}, and a message is an object with role and content, or "
            "with from and value."
        )
    # Tables give every message the keys of all; a null in them is a key that is not there.
    message = {k: v for k, v in plain(item).items() if v is not None or k == "content"}
    if "role" not in item and "from" in item:
        role = message.pop("from", None)
        if message.get("content") is not None and "value" in item:
            raise FedForwardError(f"{where} has both value and content. Keep one of them.")
        message.pop("content", None)
        if not isinstance(role, str) or role not in _ROLES:
            raise FedForwardError(
                f"{where} is from {role!r}, which is not known. Known are {', '.join(_ROLES)}."
            )
        message = {"role": _ROLES[role], "content": message.pop("value", None), **message}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise FedForwardError(
            f"{where} has no role: it is {kind_of(item)}. A message has role and content, or from "
            "and value."
        )
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _joined(content, where)
    elif content is None and not message.get("tool_calls"):
        raise FedForwardError(f"{where} says nothing: its content is null or missing.")
    elif content is not None and not isinstance(content, str):
        raise FedForwardError(
            f"{where}: its content is {kind_of(content)}. It must be text, or a list of parts that "
            "are text."
        )
    else:
        text_of(content, "content", where)
    return message


def _joined(parts: Sequence[Any], where: str) -> str:
    """The text of a message that is given in parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or isinstance(text, Number):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise FedForwardError(
                f"{where} has a part that is no text ({kind or kind_of(part)}). Only text is used."
            )
        text_of(text, "content", where)
        texts.append(text)
    return "".join(texts)


def _tools(value: Any, where: str) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except json.JSONDecodeError as error:
            raise FedForwardError(
                f"{where}: the field tools is text and no JSON: {error.msg}."
            ) from error
    if not value:
        return None
    if not isinstance(value, list):
        raise FedForwardError(
            f"{where}: the field tools holds {kind_of(value)}, and it must be a list of tools."
        )
    return [plain(tool) for tool in value]


def read_template(name: str) -> str:
    """The chat template in a file.

    Raises:
        FedForwardError: it cannot be read.
    """
    try:
        text = home(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise FedForwardError(
            f"data.chat_template = {name!r} cannot be read: {reason}. Give a file with a Jinja "
            "template."
        ) from error
    if "messages" not in text:
        raise FedForwardError(
            f"data.chat_template = {name!r} is no chat template: it does not name `messages`. Give "
            "a file with a Jinja template."
        )
    return text


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: all of it, up to the last answer's end.
        spans: [begin, end) of the characters of each answer that counts; the last is the last
            answer.
        references: what each of these answers says.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    references: tuple[str, ...]


class ChatRenderer:
    """Renders conversations by the chat template of a tokenizer."""

    def __init__(self, tokenizer: Any, template: str | None = None, loss_on: str = "last") -> None:
        """Find the template.

        Args:
            tokenizer: what has it.
            template: a file that has it in place of the tokenizer's own, or None.
            loss_on: which answers count, "last" or "all".

        Raises:
            FedForwardError: there is no template, or the file cannot be read.
        """
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        if template is not None:
            tokenizer.chat_template = read_template(template)
        if not tokenizer.chat_template:
            raise FedForwardError(
                "data.chat needs a chat template, and the tokenizer of this model has none. Give "
                "one as a file in data.chat_template, use a chat model, or write data.prompt and "
                "data.answer in place of data.chat."
            )
        own = tokenizer.chat_template
        text = own if isinstance(own, str) else json.dumps(own)
        self._knows_tools = "tools" in text
        self._asks_for_date = _NOW.search(text.replace('\\"', '"')) is not None
        if self._asks_for_date:
            LOGGER.warning(
                "the chat template asks for today's date, and is given %s, so that a run has the "
                "same tokens on every day",
                DATE.strftime("%d %B %Y"),
            )

    def prompt(self, text: str) -> str:
        """A single message of a user, rendered up to where the assistant begins."""
        return self._render(Conversation([{"role": "user", "content": text}]), "data.example", True)

    def render(self, talk: Conversation, where: str) -> Rendered | None:
        """A conversation up to its last answer; None if it has none.

        Raises:
            FedForwardError: the template refuses the conversation, knows no tools, or renders an
                answer otherwise where more follows.
        """
        answered = talk.answered
        if not answered:
            return None
        if talk.tools and not self._knows_tools:
            raise FedForwardError(
                f"{where} has tools, and the chat template of this tokenizer does not know them. "
                "Use another model or data.chat_template, or rename the field tools."
            )
        last = answered[-1]
        text = self._render(_first(talk, last + 1), where)
        counted = [last] if self.loss_on == "last" else answered
        spans = []
        for place in counted:
            before = self._render(_first(talk, place), where, True)
            begin = _common(before, text)
            if begin < len(before):
                # A template may begin an answer that follows otherwise than one that is to come.
                bare = self._render(_first(talk, place), where)
                if not text.startswith(bare):
                    raise FedForwardError(self._changes(where, place))
                # What the answer says may begin like the prompt for it: where it begins is seen in
                # two other answers.
                begin = min(max(begin, len(bare)), self._header(talk, place, where))
            end = len(text)
            if place != last:
                whole = self._render(_first(talk, place + 1), where)
                if not text.startswith(whole):
                    raise FedForwardError(self._changes(where, place))
                end = len(whole)
            spans.append((begin, end))
        said = [talk.messages[place].get("content") or "" for place in counted]
        return Rendered(text, tuple(spans), tuple(said))

    def _header(self, talk: Conversation, place: int, where: str) -> int:
        """How many characters stand before what a message says."""
        texts = []
        for word in ("A", "Z"):
            message = {"role": ASSISTANT, "content": word}
            said = Conversation([*talk.messages[:place], message], talk.tools)
            texts.append(self._render(said, where))
        return _common(*texts)

    def _changes(self, where: str, place: int) -> str:
        return (
            f"{where}: the chat template renders message {place + 1} in another way when more "
            f"follows, so its tokens cannot be told apart (data.loss_on = {self.loss_on!r}). Use "
            "data.loss_on = 'last', or a template of your own in data.chat_template."
        )

    def _dated(self, tools: list[Any] | None) -> str | None:
        """The template with a date in place of today's; None where it asks for none."""
        if not self._asks_for_date:
            return None
        own: str = self.tokenizer.get_chat_template(None, tools)
        return _NOW.sub(lambda found: repr(DATE.strftime(found[2])), own)

    def _render(self, talk: Conversation, where: str, begin_answer: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    talk.messages,
                    tools=talk.tools,
                    tokenize=False,
                    add_generation_prompt=begin_answer,
                    chat_template=self._dated(talk.tools),
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise FedForwardError(
                f"The chat template is no Jinja template: line {error.lineno}: {error.message}. "
                "Mend data.chat_template, or the tokenizer's own."
            ) from error
        except Exception as error:
            # Whatever a template does not expect is an error of its own making.
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(message["role"] for message in talk.messages[:8])
            raise FedForwardError(
                f"{where}: the chat template refuses the conversation ({roles}): "
                f"{reason.rstrip('.')}. Mend the row, or give a template in data.chat_template."
            ) from error


def _first(talk: Conversation, count: int) -> Conversation:
    return Conversation(talk.messages[:count], talk.tools)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
