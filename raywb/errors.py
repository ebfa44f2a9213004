"""Every exception that raywb raises, in one tree.

    RaywbError
    ├── SettingsError          a setting has a value that cannot be used (also a ValueError)
    │   └── SettingsConflict   a second start() asks for other settings than the running service has
    ├── NoClusterError         there is no Ray cluster to attach to, and none may be started
    ├── ServiceUnavailable     the service cannot be reached in time
    │   └── VersionMismatch    client and service do not speak the same protocol
    ├── DirectoryError         a directory is no service's, or cannot be worked in
    │   └── DirectoryInUse     a service, or another command, is at work in it
    ├── MetricTypeError        log(strict=True) was given what W&B cannot chart (also a TypeError)
    ├── ArtifactError          log_artifact(strict=True) was given a path that cannot be taken
    ├── FrameError             bytes that are no whole, undamaged frame
    ├── FleetError             the fleet collector cannot say what it was asked for
    │   ├── KeyRefused         W&B's server does not accept the key
    │   ├── ProjectUnknown     there is no such project, or the key may not see it
    │   ├── FleetTimeout       not everything was there within the time limit
    │   └── SecretMissing      a key, an entity or a project is to be had nowhere
    ├── LaunchError            a machine cannot be started, looked at or ended
    │   ├── SourceNotPinned    what is to run is not one commit that the remote has
    │   ├── VastKeyRefused     there is no key of Vast.ai's, or it is not accepted
    │   ├── NoOffer            no machine that is to be had is as asked for
    │   ├── VastUnavailable    Vast.ai gives no answer, or none that can be used
    │   ├── InstanceUnknown    there is no such instance
    │   └── NotDestroyed       an instance is still there after it was to be destroyed
    └── SinkError              W&B's side could not take what it was given
        └── KeyMissing         a run is online, and the service has no key of W&B's

``attach``, ``start``, ``flush`` and ``finish`` raise; ``log`` raises only for the caller's own
mistakes, and only with ``strict=True``; so do ``log_table`` and ``log_artifact``. A failure in the
background is counted, with its reason, in :attr:`raywb.Client.stats` and in :func:`raywb.status`.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "DirectoryError",
    "DirectoryInUse",
    "FleetError",
    "FleetTimeout",
    "FrameError",
    "InstanceUnknown",
    "KeyMissing",
    "KeyRefused",
    "LaunchError",
    "MetricTypeError",
    "NoClusterError",
    "NoOffer",
    "NotDestroyed",
    "ProjectUnknown",
    "RaywbError",
    "SecretMissing",
    "ServiceUnavailable",
    "SettingsConflict",
    "SettingsError",
    "SinkError",
    "SourceNotPinned",
    "VastKeyRefused",
    "VastUnavailable",
    "VersionMismatch",
]


class RaywbError(Exception):
    """Base of everything that raywb raises on its own account."""


class SettingsError(RaywbError, ValueError):
    """Raised when a setting is unknown, or has a value that cannot be used."""


class SettingsConflict(SettingsError):
    """Raised when ``start()`` asks for other settings than the running service was given."""


class NoClusterError(RaywbError):
    """Raised when there is no Ray cluster to attach to, and none may be started."""


class ServiceUnavailable(RaywbError):
    """Raised when the service does not answer within the time given."""


class VersionMismatch(ServiceUnavailable):
    """Raised when client and service speak different versions of the protocol."""


class DirectoryError(RaywbError):
    """Raised when a directory is no raywb service's, or cannot be worked in."""


class DirectoryInUse(DirectoryError):
    """Raised when a service, or another command, is at work in a directory."""


class MetricTypeError(RaywbError, TypeError):
    """Raised by ``log()`` of a strict client for a value that W&B cannot chart."""


class ArtifactError(RaywbError, ValueError):
    """Raised by ``log_artifact()`` of a strict client for a path that cannot be taken."""


class FrameError(RaywbError):
    """Raised when bytes are not a whole, undamaged frame."""


class FleetError(RaywbError):
    """Raised when W&B's server, or what stands before it, gives no answer that can be used."""


class KeyRefused(FleetError):
    """Raised when W&B's server does not accept the key."""


class ProjectUnknown(FleetError):
    """Raised when there is no such project, or the key may not see it."""


class FleetTimeout(FleetError):
    """Raised when not everything was there within the time limit."""


class SecretMissing(FleetError):
    """Raised when a key, an entity or a project is to be had nowhere."""


class LaunchError(RaywbError):
    """Raised when a machine cannot be started, looked at or ended."""


class SourceNotPinned(LaunchError):
    """Raised when what is to run is not one commit that the remote has."""


class VastKeyRefused(LaunchError):
    """Raised when there is no key of Vast.ai's, or Vast.ai does not accept it."""


class NoOffer(LaunchError):
    """Raised when no machine that Vast.ai offers is as it was asked for."""


class VastUnavailable(LaunchError):
    """Raised when Vast.ai gives no answer, or none that can be used."""


class InstanceUnknown(LaunchError):
    """Raised when Vast.ai knows no such instance of this account."""


class NotDestroyed(LaunchError):
    """Raised when an instance is still there after it was to be destroyed."""


class SinkError(RaywbError):
    """Raised inside a sink when W&B's client or its files refuse what they are given."""


class KeyMissing(SinkError):
    """Raised when a run is online and its service has no key of W&B's, or no longer has it."""
