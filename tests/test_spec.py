"""Specs: what text becomes which call, and what the errors say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from vfl.errors import UsageError
from vfl.spec import Spec, describe, parse, resolve


def echo(
    alpha: float, count: int = 3, flag: bool = False, limit: int | None = None, name: str = "x", *, rng: object
) -> dict[str, Any]:
    return {"alpha": alpha, "count": count, "flag": flag, "limit": limit, "name": name, "rng": rng}


def many(first: int, *rest: float, scale: float | None = 1.0) -> tuple[Any, ...]:
    return first, rest, scale


def nothing() -> str:
    return "called"


def required(*, depth: int, mode: int | str = "auto") -> tuple[int, int | str]:
    return depth, mode


def options(**others: int) -> dict[str, int]:
    return others


class Pair(NamedTuple):
    a: int
    b: float = 0.5


@dataclass
class Config:
    rate: float
    on: bool = True


TABLE: dict[str, Callable[..., Any]] = {
    "echo": echo,
    "many": many,
    "nothing": nothing,
    "required": required,
    "options": options,
    "pair": Pair,
    "config": Config,
}


def call(text: str) -> Any:
    return resolve(text, TABLE, "thing", rng="seeded")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("iid", Spec("iid", (), {})),
        ("iid:", Spec("iid", (), {})),
        (" a : 1 , 2 ", Spec("a", ("1", "2"), {})),
        ("a:1,b=2,c-d=x=y", Spec("a", ("1",), {"b": "2", "c_d": "x=y"})),
        ("a:path=c:d", Spec("a", (), {"path": "c:d"})),
        ("a:b=", Spec("a", (), {"b": ""})),
    ],
)
def test_parse_splits_name_values_and_named_values(text: str, spec: Spec) -> None:
    assert parse(text) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:b=1,2", "'2' has no name but follows a named value"),
        ("a:b=1,b=2", "gives 'b' twice"),
        ("a:b-c=1,b_c=2", "gives 'b_c' twice"),
        ("a:1,,2", "nothing before or after one of its commas"),
        ("a:1,", "nothing before or after one of its commas"),
    ],
)
def test_parse_refuses_ambiguous_text(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in str(caught.value)
    assert repr(text) in str(caught.value)


def test_values_are_converted_by_annotation_and_context_is_filled_in() -> None:
    assert call("echo:0.5") == {
        "alpha": 0.5, "count": 3, "flag": False, "limit": None, "name": "x", "rng": "seeded"
    }  # fmt: skip
    made = call("echo:1e-3,4,true,limit=7,name=7")
    assert made == {"alpha": 0.001, "count": 4, "flag": True, "limit": 7, "name": "7", "rng": "seeded"}
    assert {n: type(v) for n, v in made.items()} == {
        "alpha": float, "count": int, "flag": bool, "limit": int, "name": str, "rng": str
    }  # fmt: skip
    assert call("nothing") == "called"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("1", True), ("0", False)])
def test_bools_are_true_false_1_and_0(text: str, value: bool) -> None:
    assert call(f"echo:0,flag={text}")["flag"] is value


@pytest.mark.parametrize("text", ["none", "None", ""])
def test_none_is_written_none_or_left_empty(text: str) -> None:
    assert call(f"echo:0,limit={text}")["limit"] is None


@pytest.mark.parametrize(("text", "value"), [("-2", -2), ("1e6", 1_000_000), ("2.5E+1", 25), ("1_000", 1000)])
def test_whole_numbers_may_have_an_exponent(text: str, value: int) -> None:
    made = call(f"echo:0,count={text}")["count"]
    assert made == value
    assert type(made) is int


@pytest.mark.parametrize("text", ["1.5", "5.0", "1e-3", "1.23e1", "1e999", "inf", "nan", "", "three", "0x10"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=rf"where count is a whole number, not '{text}'$"):
        call(f"echo:0,count={text}")


def test_variadic_values_take_their_annotation() -> None:
    assert call("many:1") == (1, (), 1.0)
    assert call("many:1,2,3.5,scale=none") == (1, (2.0, 3.5), None)


def test_the_first_fitting_type_of_a_union_is_taken() -> None:
    assert call("required:depth=1,mode=2") == (1, 2)
    assert call("required:depth=1,mode=deep") == (1, "deep")


def test_classes_are_called_with_converted_fields() -> None:
    assert call("pair:3,b=2") == Pair(3, 2.0)
    assert call("config:1,on=false") == Config(1.0, False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ecko:1", "unknown thing 'ecko'; did you mean 'echo'?"),
        ("zzz", "unknown thing 'zzz'; known: config, echo, many, nothing, options, pair, required"),
        ("echo", "; missing a required argument: 'alpha'"),
        ("echo:1,2,true,4,n,6", ", which takes at most 5 unnamed values, not 6"),
        ("pair:1,2,3", "expected pair:A[,b=0.5], which takes at most 2 unnamed values, not 3"),
        ("nothing:1", "thing 'nothing:1': expected nothing, which takes no unnamed values, not 1"),
        ("echo:x", ", where alpha is a number, not 'x'"),
        ("echo:1,flag=yes", ", where flag is true or false, not 'yes'"),
        ("echo:1,limit=few", ", where limit is a whole number or none, not 'few'"),
        ("echo:1,beta=2", ", which has no 'beta'"),
        ("echo:1,rng=2", ", which has no 'rng'"),
        ("echo:1,alpha=2", "; multiple values for argument 'alpha'"),
        ("many:1,rest=2", ", which has no 'rest'"),
        ("many:1,2,x", ", where rest is a number, not 'x'"),
        ("required:1", "expected required:depth=DEPTH[,mode=auto], which takes no unnamed values, not 1"),
        ("required", "depth"),
        ("options:a=1", ", which has no 'a'"),
        ("options:others=1", ", which has no 'others'"),
    ],
)
def test_a_bad_spec_is_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        call(text)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    name = text.partition(":")[0]
    if name in TABLE:
        assert message.startswith(f"thing {text!r}: expected {describe(name, TABLE[name], {'rng': None})}")


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("nothing", "nothing"),
        ("echo", "echo:ALPHA[,count=3,flag=false,limit=none,name=x]"),
        ("many", "many:FIRST[,REST,…,scale=1.0]"),
        ("required", "required:depth=DEPTH[,mode=auto]"),
        ("options", "options"),
        ("pair", "pair:A[,b=0.5]"),
    ],
)
def test_the_usage_brackets_what_may_be_left_out(name: str, usage: str) -> None:
    assert describe(name, TABLE[name], {"rng": None}) == usage
