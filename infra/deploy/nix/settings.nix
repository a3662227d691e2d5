# Options of NixOS made from the JSON Schema of drover's settings, which is printed from the program itself
# (../settings.schema.json): each has the setting's name, type, bounds and text. An option that is not set is left to
# drover's own default and to DROVER_… variables; a name that drover does not know is an error of the evaluation.
{ lib, schema }:
let
  inherit (lib) types;

  definition = reference: schema."$defs".${lib.removePrefix "#/$defs/" reference};
  resolve = node: if node ? "$ref" then definition node."$ref" // removeAttrs node [ "$ref" ] else node;

  bounded = node: type:
    let
      within = value:
        (!(node ? minimum) || value >= node.minimum)
        && (!(node ? maximum) || value <= node.maximum)
        && (!(node ? exclusiveMinimum) || value > node.exclusiveMinimum);
    in
    if node ? minimum || node ? maximum || node ? exclusiveMinimum then types.addCheck type within else type;

  typeOf = unresolved:
    let node = resolve unresolved; in
    if node ? anyOf then types.nullOr (typeOf (lib.findFirst (one: (one.type or "") != "null") { } node.anyOf))
    else if node ? enum then types.enum node.enum
    else if node ? const then types.enum [ node.const ]
    else if node.type == "boolean" then types.bool
    else if node.type == "integer" then bounded node types.int
    else if node.type == "number" then bounded node (types.either types.int types.float)
    else if node.type == "string" then types.str
    else if node.type == "array" then types.listOf (typeOf node.items)
    else if node ? properties then types.submodule { options = optionsOf node; }
    else types.attrsOf (typeOf node.additionalProperties);

  optionsOf = node: lib.mapAttrs (name: property: option (builtins.elem name (node.required or [ ])) property) node.properties;

  option = required: property: lib.mkOption ({
    description = (resolve property).description or "";
    type = if required then typeOf property else types.nullOr (typeOf property);
  } // lib.optionalAttrs (!required) { default = null; });

  # TOML has no null.
  set = value:
    if builtins.isAttrs value then lib.mapAttrs (_: set) (lib.filterAttrs (_: one: one != null) value)
    else if builtins.isList value then map set value
    else value;
in
{
  type = types.submodule { options = optionsOf schema; };
  inherit set;
}
