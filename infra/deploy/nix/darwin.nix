# nix-darwin module of drover: a worker. `imports = [ /path/to/drover/infra/deploy/nix/darwin.nix ];`
{ config, lib, ... }:
let
  cfg = config.services.drover;
  worker = import ./worker.nix { inherit lib; package = cfg.package; tokenDefault = "/etc/drover/ray-token"; };
in
{
  options.services.drover = {
    package = lib.mkOption { type = lib.types.package; description = "The drover to run: its checkout's environment, or a package of it."; };
    worker = worker.options;
  };

  config = lib.mkIf cfg.worker.enable {
    assertions = worker.assertions cfg.worker ++ [
      {
        assertion = cfg.worker.store == "";
        message = "services.drover.worker.store is set: a chroot store cannot build on macOS, leave it empty.";
      }
    ];
    launchd.daemons.drover-worker.serviceConfig = {
      Label = "org.drover.worker";
      ProgramArguments = worker.command cfg.worker;
      EnvironmentVariables = {
        PATH = "/nix/var/nix/profiles/default/bin:/usr/bin:/bin:/usr/sbin:/sbin";
        DROVER_STOP_GRACE_S = toString cfg.worker.stopGraceSeconds;
      };
      RunAtLoad = true;
      KeepAlive = true;
      ThrottleInterval = 10;
      ExitTimeOut = cfg.worker.stopGraceSeconds + 100;
      ProcessType = "Interactive";
      SoftResourceLimits.NumberOfFiles = 65536;
      StandardOutPath = "/var/log/drover-worker.log";
      StandardErrorPath = "/var/log/drover-worker.log";
    };
  };
}
