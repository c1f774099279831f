"""The sections of a run's configuration, one class each, with what a section can check by itself.

Here are those of the model and the data; others are in `method_sections` and `run_section`.
What joins two sections is checked in `schema`, and what a method's name decides in `rules`.
Imports neither PyTorch nor transformers.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fedforward.config.fields import (
    MOST_COUNTED,
    Classes,
    Count,
    Metrics,
    PathText,
    Positive,
    Section,
    no_repeats,
)


class ModelSection(Section):
    """[model]"""

    path: PathText = Field(description="folder in Hugging Face format, GGUF file, or hub name")
    adapter: PathText | None = Field(
        None, description="folder of a LoRA adapter in PEFT format that the run goes on from"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights as they are held in memory"
    )
    tune: Literal["lora", "full"] = Field("lora", description="what the run changes")
    head: Literal["causal", "classification"] = Field(
        "causal", description="what the network ends in: the next token, or a text's class"
    )
    blocks: str | list[int] = Field(
        "all", description='transformer blocks that are tuned: "all", "8-15" or [0, 5], from 0'
    )
    quantization: Literal["none", "nf4", "stored"] = Field(
        "none",
        description='of a frozen base: "nf4" holds its linear layers in 4 bits through '
        'bitsandbytes, "stored" takes a folder that is quantised already',
    )
    device_map: Literal["none", "auto"] = Field(
        "none", description='"auto" spreads a frozen base over all CUDA devices and host memory'
    )
    offload: Literal["none", "host"] = Field(
        "none",
        description='"host" keeps the transformer blocks that a client does not perturb in host '
        "memory; they come to the CUDA device in turn (without one there is nothing to move)",
    )

    @property
    def tuned_blocks(self) -> tuple[int, ...] | None:
        """The numbers in `blocks`, in order; None for all."""
        if isinstance(self.blocks, list):
            return tuple(sorted(set(self.blocks)))
        if self.blocks == "all":
            return None
        first, dash, last = self.blocks.partition("-")
        end = int(last if dash else first)
        if end > MOST_COUNTED:
            raise ValueError
        return tuple(range(int(first), end + 1))

    @model_validator(mode="after")
    def _blocks_are_numbers(self) -> "ModelSection":
        try:
            blocks = self.tuned_blocks
        except ValueError:
            blocks = ()
        if blocks is not None and (not blocks or min(blocks) < 0):
            raise ValueError(
                f"blocks = {self.blocks!r} is not allowed: it must be 'all', a range such as "
                "'8-15', or a list of whole numbers from 0"
            )
        return self

    @model_validator(mode="after")
    def _an_adapter_is_tuned_as_one(self) -> "ModelSection":
        if self.adapter is not None and self.tune == "full":
            raise ValueError(
                f"adapter = {self.adapter!r} is what a run with tune = 'lora' goes on from; use "
                "that, or merge the adapter into its base and leave it out"
            )
        return self

    @model_validator(mode="after")
    def _only_a_frozen_base_in_one_place_is_packed(self) -> "ModelSection":
        for key, value in (("quantization", self.quantization), ("device_map", self.device_map)):
            if value != "none" and self.offload == "host":
                raise ValueError(
                    f"offload = 'host' moves plain weights of one device, and {key} = {value!r}; "
                    f"use offload = 'none' or {key} = 'none'"
                )
            if value != "none" and self.tune == "full":
                raise ValueError(
                    f"{key} = {value!r} is for a frozen base, and tune = 'full' changes every "
                    f"weight; use tune = 'lora' or {key} = 'none'"
                )
        return self


class LoraSection(Section):
    """[lora]"""

    rank: Count = Field(8, description="r")
    alpha: Positive = Field(16.0, description="the product BA is scaled by alpha / rank")
    targets: str | list[str] = Field(
        "all-linear",
        description='"all-linear" (what can be probed), or names such as ["q_proj", "v_proj"]',
    )
    factors: Literal["both", "B", "R"] = Field(
        "both",
        description='"B" keeps the initial A; "R" tunes the r x r matrix R of B = U R alone',
    )
    init: Literal["random", "aligned"] = Field(
        "random",
        description='of A: "aligned" spans the directions in which each layer\'s inputs vary most; '
        "of U: those in which the loss pulls",
    )
    alignment: Literal["forward", "backward"] = Field(
        "forward",
        description='of R: "forward" aligns one U for all modules that write into the residual '
        'stream, the only ones adapted; "backward" one for each module, by a backward pass a row',
    )
    init_file: PathText | None = Field(
        None,
        description="file of `fedforward align` with the aligned A; default is made at the start",
    )

    @model_validator(mode="after")
    def _a_u_of_each_module_is_an_aligned_one(self) -> "LoraSection":
        for key, found, wanted in (("factors", self.factors, "R"), ("init", self.init, "aligned")):
            if self.alignment == "backward" and found != wanted:
                raise ValueError(
                    f"alignment = 'backward' aligns the U of factors = 'R', and {key} = {found!r}; "
                    f"set {key} = {wanted!r}, or leave alignment out"
                )
        return self

    @model_validator(mode="after")
    def _a_file_is_what_aligned_begins_with(self) -> "LoraSection":
        if self.init_file is not None and self.init != "aligned":
            raise ValueError(
                f"init_file = {self.init_file!r} has the A that init = 'aligned' begins with, and "
                f"init = {self.init!r}; set init = 'aligned', or leave init_file out"
            )
        return self


class DataSection(Section):
    """[data]"""

    source: PathText | list[PathText] = Field(
        description="file (.jsonl .json .csv .tsv .parquet .arrow, also .jsonl.gz or .zst), "
        "folder, pattern such as 'part-*.jsonl', or hub data set; or a list of them"
    )
    weights: list[Positive] | None = Field(
        None, description="shares of the sources among training examples; default by their sizes"
    )
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    prompt: str = Field(
        "### Instruction:\n{instruction}\n\n{?input}### Input:\n{input}\n\n{/input}### Response:\n",
        description="template; {name} stands for a field, {?name}…{/name} is there only if it has "
        "text",
    )
    answer: str = Field("{output}", description="template; only its tokens count in the loss")
    chat: str | None = Field(
        None,
        description="field with a conversation, or 'alpaca' or 'prompt-completion', in place of "
        "prompt and answer; the tokenizer's chat template makes the text",
    )
    chat_template: PathText | None = Field(
        None, description="file with a Jinja template, in place of the tokenizer's own"
    )
    loss_on: Literal["last", "all"] = Field(
        "last", description="which of an assistant's answers in a conversation count in the loss"
    )
    label_words: dict[str, str] | None = Field(
        None,
        description="words for the values of the answer's field, all of them possible answers: "
        '{ 0 = " terrible", 1 = " great" }',
    )
    classes: Classes | None = Field(
        None,
        description="names of a classifier's classes, in the order of its head; default "
        "label_words, or the different answers in the data of one machine",
    )
    public: PathText | list[PathText] | None = Field(
        None,
        description="text that anyone may see, for what is made of text before a run: a source "
        "with the same fields, or a .txt file; default is the training rows, on one machine",
    )
    public_rows: Count = Field(48, description="rows of it that are looked at")
    answer_tokens: Count = Field(48, description="most tokens of a generated answer")
    heldout: Annotated[float, Field(gt=0.0)] = Field(
        0.01,
        description="share of the examples (below 1) or their number, kept for evaluation; none "
        "are with evaluation.source",
    )
    sequence_length: Count = Field(512, description="most tokens of an example")
    limit: Count | None = Field(None, description="use only so many examples of the source")
    example: str | None = Field(
        None, description="prompt to answer before and after; default the first held-out one"
    )
    fields: dict[str, str] | None = Field(
        None,
        description="what the templates' fields are called in this source, where that differs: "
        '{ instruction = "question" }',
    )

    @model_validator(mode="after")
    def _sources_are_named_and_weighed(self) -> "DataSection":
        names = self.source if isinstance(self.source, list) else [self.source]
        if not names:
            raise ValueError("source = [] is not allowed: it must be one source or more")
        no_repeats(names)
        if self.weights is not None and len(self.weights) != len(names):
            raise ValueError(
                f"weights = {self.weights!r} has {len(self.weights)} numbers for {len(names)} "
                "sources; give one for each source"
            )
        return self

    @model_validator(mode="after")
    def _text_is_made_in_one_way(self) -> "DataSection":
        defaults = type(self).model_fields
        written = [k for k in ("prompt", "answer") if getattr(self, k) != defaults[k].default]
        written += [k for k in ("label_words", "classes") if getattr(self, k) is not None]
        if self.chat is not None and written:
            raise ValueError(
                f"chat = {self.chat!r} makes prompts and answers of conversations, and "
                f"{written[0]} is set as well; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _classes_are_named_once(self) -> "DataSection":
        if self.classes is not None and self.label_words is not None:
            raise ValueError(
                f"classes = {self.classes!r} and label_words both name the classes; leave one of "
                "the two out"
            )
        return self

    @property
    def default_templates(self) -> bool:
        """Whether neither prompt nor answer says anything else than the default."""
        defaults = type(self).model_fields
        return all(getattr(self, key) == defaults[key].default for key in ("prompt", "answer"))

    @field_validator("label_words")
    @classmethod
    def _words_can_be_told_apart(cls, words: dict[str, str] | None) -> dict[str, str] | None:
        if words is not None and (len(words) < 2 or len(set(words.values())) < len(words)):
            raise ValueError(
                f"{words!r} is not allowed: it must be two or more different words by the values "
                'that they stand for, as in { 0 = " terrible", 1 = " great" }'
            )
        return words


class EvaluationSection(Section):
    """[evaluation]"""

    metrics: Metrics = Field(
        [], description="measured beside the held-out loss; also package.module:function"
    )
    source: PathText | None = Field(
        None, description="file or hub data set to evaluate on; default examples kept by heldout"
    )
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("test", description="split of a hub data set")
    limit: Count | None = Field(None, description="evaluate on only so many examples")
    site: str | None = Field(
        None,
        description="across machines: the site that evaluates; default all, weighted by their "
        "held-out answers",
    )
