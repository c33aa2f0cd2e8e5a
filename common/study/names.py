"""Names of arms: "NAME" or "NAME@SETTING". A setting is, for example, a task, a data set or a learning rate."""

from collections.abc import Collection


def without_setting(arm: str) -> str:
    """Return the name of an arm without "@SETTING"."""
    return arm.partition("@")[0]


def setting_of(arm: str) -> str:
    """Return the setting of an arm, "" if it has none."""
    return arm.partition("@")[2]


def in_setting(name: str, setting: str) -> str:
    """Return "NAME@SETTING", or `name` if the setting is ""."""
    return f"{name}@{setting}" if setting else name


def have_one_setting(arms: Collection[str]) -> bool:
    """Return whether all arms have the same setting, so that a text need not repeat it."""
    return len(set(map(setting_of, arms))) == 1


def short_names(arms: Collection[str]) -> list[str]:
    """Return the names of arms, without settings if all have the same one."""
    return list(map(without_setting, arms)) if have_one_setting(arms) else list(arms)


def contrast_name(arm: str, reference: str, minus: str = " − ") -> str:
    """Return "arm − reference", with a setting that both share in brackets. `minus`: the text between the names."""
    setting = setting_of(arm)
    if not setting or setting != setting_of(reference):
        return f"{arm}{minus}{reference}"
    return f"{without_setting(arm)}{minus}{without_setting(reference)} ({setting})"
