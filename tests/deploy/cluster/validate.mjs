// Reads objects as a JSON list, and prints what the schemas of KEDA and of Gateway API say of each.
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
import { TriggerAuthentication } from "@kubernetes-models/keda/keda.sh/v1alpha1/TriggerAuthentication";
import { HTTPRoute } from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/HTTPRoute";

const kinds = { ScaledObject, TriggerAuthentication, HTTPRoute };
let text = "";
for await (const block of process.stdin) text += block;
const errors = JSON.parse(text).map((object) => {
  try {
    new kinds[object.kind](object).validate();
    return "";
  } catch (error) {
    return `${object.kind}: ${error.message}`;
  }
});
console.log(JSON.stringify(errors));
