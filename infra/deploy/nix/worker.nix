# Options of `drover worker` and its command line, for NixOS and nix-darwin alike.
{ lib, package, tokenDefault }:
let
  inherit (lib) mkOption types;
  text = description: mkOption { type = types.str; inherit description; };
  texts = description: mkOption { type = types.listOf types.str; default = [ ]; inherit description; };
  number = default: description: mkOption { type = types.ints.unsigned; inherit default description; };
in
{
  options = {
    enable = lib.mkEnableOption "a worker of a drover farm";
    package = mkOption { type = types.package; default = package; description = "The drover to run."; };
    head = text "`HOST:PORT` of the farm's Ray head.";
    host = text "Address of this machine for the farm.";
    name = text "Name of this worker, unique in the farm.";
    rayTokenFile = mkOption {
      type = types.str;
      default = tokenDefault;
      description = "File with the farm's Ray token, mode 0400. Never a path of the Nix store, which everybody reads.";
    };
    stateDir = mkOption { type = types.str; default = "/var/lib/drover-worker"; description = "Its directory."; };
    slots = number 0 "Builds at one time; 0: one per core.";
    minFreeMb = number 512 "MiB that must be free on its disks, or it takes no work.";
    emulate = texts "Systems that it pretends to be.";
    features = texts "System features beside the machine's own.";
    network = mkOption { type = types.bool; default = true; description = "Whether sources are fetched here."; };
    store = mkOption { type = types.str; default = ""; description = "Chroot store; empty: one in its directory."; };
    nixOptions = mkOption { type = types.attrsOf types.str; default = { }; description = "Nix settings of its builds."; };
    stopGraceSeconds = number 3600 "Seconds in which running builds may end when the worker is stopped.";
  };

  command = cfg:
    [ "${cfg.package}/bin/drover" "worker" "--head" cfg.head "--host" cfg.host "--name" cfg.name ]
    ++ [ "--ray-token" cfg.rayTokenFile "--state-dir" cfg.stateDir ]
    ++ [ "--slots" (toString cfg.slots) "--min-free-mb" (toString cfg.minFreeMb) ]
    ++ lib.concatMap (system: [ "--emulate" system ]) cfg.emulate
    ++ lib.concatMap (feature: [ "--feature" feature ]) cfg.features
    ++ lib.optionals (!cfg.network) [ "--no-network" ]
    ++ lib.optionals (cfg.store != "") [ "--store" cfg.store ]
    ++ lib.concatLists (lib.mapAttrsToList (name: value: [ "--nix-option" name value ]) cfg.nixOptions);

  assertions = cfg: [
    {
      assertion = !(lib.hasPrefix "/nix/store/" cfg.rayTokenFile);
      message = "services.drover.worker.rayTokenFile lies in the Nix store, where everybody can read it: name a file outside of it.";
    }
    {
      assertion = builtins.match ".+:[0-9]{1,5}" cfg.head != null;
      message = "services.drover.worker.head is `${cfg.head}`; it wants HOST:PORT of the farm's Ray head, such as 10.0.0.5:6379.";
    }
    {
      assertion = builtins.match "[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?" cfg.name != null;
      message = "services.drover.worker.name is `${cfg.name}`; it wants 1 to 63 letters, digits, `.`, `_` or `-`, with a letter or digit first and last.";
    }
  ];
}
