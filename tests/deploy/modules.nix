# Values of what a module of infra/deploy/nix makes of one configuration, as JSON.
{ module, configuration }:
let
  system = import ./option_system.nix;
  config = system.evaluate {
    modules = [ (import module) configuration ];
    rest = { assertions = [ ]; nix = { package = "/nix-package"; }; systemd = { }; launchd = { }; users = { }; networking = { }; };
  };
in
{
  failed = map (one: one.message) (builtins.filter (one: !one.assertion) config.assertions);
  settings = (import ../../infra/deploy/nix/settings.nix { inherit (system) lib; schema = { properties = { }; "$defs" = { }; }; }).set (config.services.drover.settings or { });
  services = config.systemd.services or { };
  daemons = config.launchd.daemons or { };
  ports = config.networking.firewall.allowedTCPPorts or [ ];
}
