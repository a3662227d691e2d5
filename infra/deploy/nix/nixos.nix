# NixOS module of drover: coordinator, Ray head and worker. `imports = [ /path/to/drover/infra/deploy/nix/nixos.nix ];`
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkIf mkOption types;
  cfg = config.services.drover;
  settings = import ./settings.nix { inherit lib; schema = lib.importJSON ../settings.schema.json; };
  hardening = import ./hardening.nix;
  worker = import ./worker.nix { inherit lib; package = cfg.package; tokenDefault = "/etc/drover/ray-token"; };
  file = (pkgs.formats.toml { }).generate "drover.toml" (settings.set cfg.settings);
  words = lib.concatMapStringsSep " " lib.escapeShellArg;

  service = description: after: serviceConfig: {
    inherit description;
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ] ++ after;
    path = [ config.nix.package pkgs.slirp4netns ];
    serviceConfig = {
      Type = "exec";
      Restart = "always";
      RestartSec = 5;
      RestartPreventExitStatus = 2;
      KillMode = "mixed";
      StateDirectoryMode = "0700";
    } // serviceConfig;
  };
in
{
  options.services.drover = {
    package = mkOption { type = types.package; description = "The drover to run: its checkout's environment, or a package of it."; };
    settings = mkOption { type = settings.type; default = { }; description = "Settings of coordinator and head (farm.toml)."; };
    coordinator = {
      enable = lib.mkEnableOption "the coordinator of a drover farm";
      environmentFile = mkOption {
        type = types.nullOr types.str;
        default = null;
        description = "File of mode 0600 with secrets that settings name as `env:NAME`, and a bucket's credentials.";
      };
      openFirewall = mkOption { type = types.bool; default = false; description = "Whether other machines reach it."; };
    };
    head = {
      enable = lib.mkEnableOption "the Ray head of a drover farm";
      listen = mkOption { type = types.str; default = "127.0.0.1:6379"; description = "Where it listens, numeric."; };
    };
    worker = worker.options;
  };

  config = lib.mkMerge [
    (mkIf (cfg.coordinator.enable || cfg.head.enable) {
      services.drover.settings.secrets_dir = lib.mkDefault "/var/lib/drover/secrets";
      users.users.drover = { isSystemUser = true; group = "drover"; };
      users.groups.drover = { };
    })
    (mkIf cfg.coordinator.enable {
      assertions = [
        {
          assertion = cfg.settings.ray_address != null;
          message = "services.drover.settings.ray_address is not set: it is where the Ray head listens, for example services.drover.head.listen.";
        }
        {
          assertion = cfg.settings.workers == null;
          message = "services.drover.settings.workers would run builds under the coordinator's hardening: use services.drover.worker.";
        }
      ];
      services.drover.settings.ray_address = mkIf cfg.head.enable (lib.mkDefault cfg.head.listen);
      networking.firewall.allowedTCPPorts =
        mkIf cfg.coordinator.openFirewall [ (if cfg.settings.port == null then 7878 else cfg.settings.port) ];
      systemd.services.drover-coordinator = service "drover coordinator" [ "drover-head.service" ] (hardening.server // {
        User = "drover";
        ExecStart = words [
          "${cfg.package}/bin/drover" "up" "--no-workers" "--config" "${file}" "--state-dir" "/var/lib/drover/coordinator"
        ];
        StateDirectory = "drover/coordinator drover/secrets";
        TimeoutStopSec = 90;
        LimitNOFILE = 65536;
      } // lib.optionalAttrs (cfg.coordinator.environmentFile != null) {
        EnvironmentFile = cfg.coordinator.environmentFile;
      });
    })
    (mkIf cfg.head.enable {
      systemd.services.drover-head = service "drover Ray head" [ ] (hardening.server // {
        User = "drover";
        ExecStart = words [
          "${cfg.package}/bin/drover" "head" "--config" "${file}" "--state-dir" "/var/lib/drover/head" "--listen" cfg.head.listen
        ];
        StateDirectory = "drover/head drover/secrets";
        TimeoutStopSec = 60;
      });
    })
    (mkIf cfg.worker.enable {
      assertions = worker.assertions cfg.worker;
      systemd.services.drover-worker = service "drover worker" [ ] (hardening.worker // {
        ExecStart = words (worker.command cfg.worker);
        Environment = "DROVER_STOP_GRACE_S=${toString cfg.worker.stopGraceSeconds}";
        StateDirectory = "drover-worker drover/build-users";
        TimeoutStopSec = cfg.worker.stopGraceSeconds + 100;
        OOMPolicy = "continue";
        Delegate = "yes";
        TasksMax = "infinity";
        LimitNOFILE = 65536;
      });
    })
  ];
}
