"""``ood-seg settings``: profiles and every setting, with its value, range and meaning."""

from __future__ import annotations

import argparse

from ros2_ood_seg.config import PipelineConfig, describe_allowed, format_value, iter_settings, load_profile, parse_overrides, profile_names


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ood-seg settings``."""
    parser = subparsers.add_parser("settings", help="show profiles and every setting with its range")
    parser.add_argument("profile", nargs="?", default="compact", help=f"one of {', '.join(profile_names())}, or a YAML file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--markdown", action="store_true", help="as the table in docs/settings.md")
    parser.set_defaults(run=_run)


def settings_markdown(config: PipelineConfig) -> str:
    """All settings as a Markdown table."""
    rows = [f"| `{s.name}` | `{format_value(s.value)}` | {describe_allowed(s)} | {s.description} |" for s in iter_settings(config)]
    return "\n".join(["| setting | in `compact` | allowed | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _run(args: argparse.Namespace) -> int:
    config = load_profile(args.profile, parse_overrides(args.overrides))
    if args.markdown:
        print(settings_markdown(config), end="")
        return 0
    print(f"profiles: {', '.join(profile_names())}\n")
    for setting in iter_settings(config):
        print(f"{setting.name} = {format_value(setting.value)}\n    {setting.description} ({describe_allowed(setting)})")
    return 0
