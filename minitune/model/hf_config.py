"""A Hugging Face `config.json` as the values of a model, and back, by the tables of `families.py`.

What is read must be all there is: a field that is not in the family's table is refused, and so are two places that say
different things. What is written is read again and compared, so a model that its family's file cannot describe is
refused instead of being saved as another one.
"""

from typing import Any

from minitune.errors import ConfigError, nearest
from minitune.model.config import ModelConfig
from minitune.model.families import FAMILIES, ROPE, Family
from minitune.model.rope import KINDS, Rope

# Fields of a rope's description whose names are not ours.
_SETTINGS = {"rope_theta": "theta", "rope_type": "kind", "partial_rotary_factor": "share",
             "original_max_position_embeddings": "original_positions"}  # fmt: skip
_FIELD_OF = {ours: theirs for theirs, ours in _SETTINGS.items()}
_MOST_LAYERS = 10_000
_MAY_BE_NULL = ("num_kv_heads", "head_dim", "intermediate_size", "bos_id", "pad_id", "attention_softcap",
                "logits_softcap")  # fmt: skip


def read(fields: dict[str, Any], where: str) -> ModelConfig:
    """Return the values that the content of a `config.json` stands for.

    Args:
        fields: the parsed JSON object.
        where: the file's name, for error lines.

    Raises:
        ConfigError: an architecture, field or value that this engine does not implement.
    """
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}"
            + nearest(str(name), FAMILIES)
        )
    family = FAMILIES[name]
    try:
        reward = _is_reward(fields, family)
        _check_fields(fields, family)
        return ModelConfig(family=name, reward=reward, **_values({**family.defaults, **fields}, family))
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('model config: ')}") from None
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: a field has a value that no model can have ({error})") from None


def _values(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the arguments of ModelConfig that a checked file stands for."""
    values = {ours: fields[theirs] for theirs, ours in family.direct.items() if fields.get(theirs) is not None}
    null = [theirs for theirs, ours in family.direct.items() if ours not in values and ours not in _MAY_BE_NULL
            and theirs in fields]  # fmt: skip
    if null:
        raise ConfigError(f"{null[0]} is null; give it a value, or leave it out for the family's default")
    if type(values["num_layers"]) is not int or not 0 < values["num_layers"] <= _MOST_LAYERS:  # before a list of them
        raise ConfigError(f"num_layers is {values['num_layers']!r}; it must be 1 to {_MOST_LAYERS:,}")
    values |= family.constants | family.derive(fields)
    values.setdefault("num_kv_heads", values["num_heads"])
    if "head_dim" not in values:
        if values["hidden_size"] % values["num_heads"]:
            raise ConfigError("head_dim is missing and heads do not divide hidden_size")
        values["head_dim"] = values["hidden_size"] // values["num_heads"]
    values.setdefault("output_bias", values.get("attention_bias", False))
    usual = next(iter(family.activations))
    activation = fields.get(family.activation, usual)
    if activation not in family.activations:
        raise ConfigError(f"{family.activation} = {activation!r} is not implemented (only {usual!r} is)")
    values["activation"] = family.activations[activation]
    eos = fields.get("eos_token_id")
    values["eos_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    values["windows"] = _windows(fields, family)
    return values | _ropes(fields, family)


def _is_reward(fields: dict[str, Any], family: Family) -> bool:
    """Tell whether the file is of a reward model; ConfigError for one of another kind."""
    architectures = fields.get("architectures") or [family.architecture]
    reward = family.reward_architecture is not None and architectures == [family.reward_architecture]
    if architectures != [family.architecture] and not reward:
        raise ConfigError(f"architectures {architectures} is not [{family.architecture!r}]")
    if reward and len(fields.get("id2label") or "??") != 1:  # without the field, transformers' default is 2 labels
        raise ConfigError("a classifier of several labels; a reward model has one (id2label)")
    return reward


def _check_fields(fields: dict[str, Any], family: Family) -> None:
    """Raise ConfigError for a field that is not known, known but at a value that is not implemented, or missing."""
    unknown, fixed = [name for name in fields if name not in family.known], family.all_fixed
    if unknown:
        others = f"; so are {', '.join(map(repr, unknown[1:]))}" if unknown[1:] else ""
        raise ConfigError(
            f"the field {unknown[0]!r} is not known to this engine and may change the model; "
            f"it is refused rather than ignored{nearest(unknown[0], family.known)}{others}"
        )
    for name, value in fields.items():
        if name in fixed and value not in fixed[name]:
            raise ConfigError(f"{name} = {value!r} is not implemented (only {fixed[name][0]!r} is)")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    needed = [theirs for theirs, ours in family.direct.items() if ours in sizes and theirs != "n_inner"]
    missing = [name for name in (*needed, *family.required) if fields.get(name) is None]
    if missing:
        raise ConfigError(f"the field {missing[0]} is missing")


def _windows(fields: dict[str, Any], family: Family) -> tuple[int | None, ...]:
    """Return each layer's window; nothing where no layer has one."""
    layers = next(theirs for theirs, ours in family.direct.items() if ours == "num_layers")
    count, window = fields[layers], fields.get("sliding_window")
    types = fields.get("layer_types") if "layer_types" in family.window else None
    if types is not None and (len(types) != count or set(types) - {"sliding_attention", "full_attention"}):
        raise ConfigError(f"layer_types must say sliding_attention or full_attention for each of {count} layers")
    if not family.window or "use_sliding_window" in family.window and not fields.get("use_sliding_window"):
        window = None
    if window is None:
        if types and "sliding_attention" in types:
            raise ConfigError(
                "layer_types names layers with a window, but sliding_window (use_sliding_window) has none"
            )
        return ()
    slides = [kind == "sliding_attention" for kind in types or ()]
    slides = slides or [family.slides(layer, fields) for layer in range(count)]
    return tuple(window if slid else None for slid in slides) if any(slides) else ()


def _ropes(fields: dict[str, Any], family: Family) -> dict[str, Rope | None]:
    """Return the ropes that the file describes."""
    if not family.rope:
        return {"rope": None}
    outside = {key: fields[name] for name, key in family.rope.items() if fields.get(name) is not None}
    scaling, parameters = ({} if fields.get(name) is None else fields[name] for name in ROPE)
    for name, described in zip(ROPE, (scaling, parameters), strict=True):
        if not isinstance(described, dict):
            raise ConfigError(f"{name} is {described!r}; it must be an object")
    if "rope_local_base_freq" not in family.derived:
        return {"rope": _rope(family, outside, scaling, parameters)}
    # Gemma 3 has two: of layers with a window, and of the others, which alone are scaled.
    strange = sorted(set(parameters) - {"full_attention", "sliding_attention"})
    if strange:
        raise ConfigError(f"rope_parameters: {strange[0]!r} is not full_attention or sliding_attention")
    near = {} if fields.get("rope_local_base_freq") is None else {"rope_theta": fields["rope_local_base_freq"]}
    return {
        "rope": _rope(family, outside, scaling, parameters.get("full_attention") or {}, theta=1000000.0),
        "local_rope": _rope(family, near, parameters.get("sliding_attention") or {}),
    }


def _rope(family: Family, outside: dict[str, Any], *described: dict[str, Any], theta: float | None = None) -> Rope:
    """Return the rope of one or two descriptions that must agree, with what stands outside of them."""
    given: dict[str, Any] = {}
    taken: list[str] = []
    for description in described:
        kind = description.get("rope_type", description.get("type", "default"))
        if kind not in family.kinds:
            raise ConfigError(f"a rope of kind {kind!r} is not implemented; there are {', '.join(family.kinds)}")
        if description:
            _agree(given, "rope_type", family.kinds[kind])
            taken = [_FIELD_OF.get(setting, setting) for setting in KINDS[family.kinds[kind]][1]]
        parts = {"rope_theta", "partial_rotary_factor"} & {"rope_theta", *family.rope.values()}
        for key, value in description.items():
            if key not in ("type", "rope_type", *parts, *taken):
                raise ConfigError(f"the rope's field {key!r} is not implemented for the kind {kind!r}")
            if key not in ("type", "rope_type") and value is not None:
                _agree(given, key, tuple(value) if isinstance(value, list) else value)
    for key, value in outside.items():
        if key != _FIELD_OF["original_positions"]:
            _agree(given, key, value)
        elif key in taken:
            given[key] = value  # Phi-3's, which counts more than the one inside
    given = family.rope_defaults | ({"rope_theta": theta} if theta else {}) | given
    return Rope(**{_SETTINGS.get(key, key): value for key, value in given.items()})


def _agree(given: dict[str, Any], key: str, value: Any) -> None:
    """Add a setting; ConfigError where another place says otherwise."""
    if given.setdefault(key, value) != value:
        raise ConfigError(f"the rope's {key} is {given[key]!r} in one place and {value!r} in another")


def write(config: ModelConfig) -> dict[str, Any]:
    """Return the content of a `config.json` that transformers reads, with the field names of versions 4 and 5.

    ConfigError for values that the family's file cannot say.
    """
    family = FAMILIES[config.family]
    head = {"architectures": [family.architecture]}
    if config.reward:
        head = {"architectures": [family.reward_architecture], "id2label": {"0": "LABEL_0"},
                "label2id": {"LABEL_0": 0}}  # fmt: skip
    direct = {theirs: getattr(config, ours) for theirs, ours in family.direct.items()}
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    names = [theirs for theirs, ours in family.activations.items() if ours == config.activation]
    fields = {
        "model_type": config.family,
        **head,
        **direct,
        **family.restore(config),
        "eos_token_id": eos,
        family.activation: names[0] if names else config.activation,
        **_window_fields(config, family),
        **_rope_fields(config, family),
    }
    if read(fields, "the model's config") != config:
        raise ConfigError(f"this model is not one of the {config.family} family: its config.json cannot say its values")
    return fields


def _window_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the fields that say which layers have a window."""
    lengths = [window for window in config.windows if window]
    fields = {
        "sliding_window": lengths[0] if lengths else None,
        "use_sliding_window": bool(lengths),
        "max_window_layers": next((i for i, window in enumerate(config.windows) if window), config.num_layers),
        "layer_types": [
            "sliding_attention" if config.window(layer) else "full_attention" for layer in range(config.num_layers)
        ],
    }
    return {name: value for name, value in fields.items() if name in family.window}


def _rope_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the fields that describe the ropes."""
    if config.rope is None:
        return {}
    parameters, fields = _rope_parameters(config.rope, family), {}
    for name, key in family.rope.items():
        if key in parameters or key != "original_max_position_embeddings":
            fields[name] = parameters.get(key, 1.0)
    scaling = {key: value for key, value in parameters.items() if key not in family.rope.values()}
    plain = config.rope.kind == "default"
    local = config.local_rope
    if local is not None:
        fields["rope_local_base_freq"] = local.theta
        parameters = {"full_attention": parameters, "sliding_attention": _rope_parameters(local, family)}
    # "type" is what versions before 4.43 read, and what Phi-3's own check asks for.
    return {
        **fields,
        "rope_scaling": None if plain else {**scaling, "type": config.rope.kind},
        "rope_parameters": parameters,
    }


def _rope_parameters(rope: Rope, family: Family) -> dict[str, Any]:
    """Return one rope as transformers describes it."""
    settings = {_FIELD_OF.get(name, name): value for name, value in vars(rope).items() if value is not None}
    if "partial_rotary_factor" not in family.rope.values():
        settings.pop("partial_rotary_factor")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
