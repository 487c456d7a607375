// LayerGate: lets a forward pass begin before all stored KV that it reads has arrived.
#pragma once

namespace kvshare::runtime {

class LayerGate {
 public:
  virtual ~LayerGate() = default;

  // Called once a layer, before anything of it is computed or stored; returns when the KV that the step's segments hold
  // in this layer is in place. It may wait.
  virtual void BeforeLayer(int layer) = 0;

  // Something that BeforeLayer waited for will never come: what was computed over it since is worth nothing.
  virtual bool lost() const { return false; }
};

}  // namespace kvshare::runtime
